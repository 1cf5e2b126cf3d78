"""Small files that are there whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that a reader sees the old one or the new one.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def write_whole_text(path: Path, text: str) -> None:
    """The same with a text; what is not UTF-8 is spelled out."""
    write_whole(path, text.encode("utf-8", "backslashreplace"))
