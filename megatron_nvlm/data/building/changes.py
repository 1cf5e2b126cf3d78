"""Inputs that are written while a build is unfinished, or after it: their sizes and times of writing are compared."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from megatron_nvlm.data.building.inputs import Input

Stamp = tuple[int, int] | None
"""Size in bytes and `st_mtime_ns` of a file; None for one that is not there."""
_LOOKS_AT_ONCE = 16
"""Threads that ask the file system: one that is far away takes a millisecond for each answer."""


class BlockFiles:
    """What the samples of one block were read from.

    Attributes:
        places: `hash_places` of each sample's place in its input.
        stamps: of each file.
    """

    def __init__(self, places: str = "", stamps: dict[str, Stamp] | None = None) -> None:
        self.places, self.stamps = places, stamps or {}

    def add(self, source: Input, number: int) -> None:
        """Note the files of a sample before it is read: what is written in between must look changed."""
        self.add_files(source.files_of(number))

    def add_files(self, paths: Iterable[Path]) -> None:
        """Note files as they are now; those that are noted stay as they were."""
        for path in paths:
            self.stamps.setdefault(str(path), _stamp(path))

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps({"places": self.places, "stamps": self.stamps})

    @classmethod
    def from_json(cls, text: str) -> "BlockFiles":
        """Read what `to_json` wrote."""
        stored = json.loads(text)
        stamps = {path: tuple(stamp) if stamp else None for path, stamp in stored["stamps"].items()}
        return cls(stored["places"], stamps)

    @property
    def digest(self) -> str:
        """A hash of all stamps, in the order in which the files were noted."""
        return hashlib.sha256(json.dumps(list(self.stamps.values())).encode()).hexdigest()[:16]

    def changed(self) -> str | None:
        """The first file that is no longer as it was; None if all are."""
        with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
            now = pool.map(_stamp, map(Path, self.stamps))
            return next(
                (path for path, stamp in zip(self.stamps, now, strict=True) if stamp != self.stamps[path]), None
            )


def hash_places(places: Iterable[str]) -> str:
    """A hash of samples' places in their inputs, in order: tars may hold others in the same files."""
    return hashlib.sha256("\n".join(places).encode(errors="surrogateescape")).hexdigest()


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def name_changed(blocks: Iterable[Iterable[tuple[Input, int]]], digests: Iterable[str]) -> str | None:
    """The samples of the first block whose files are others than when its digest was taken; None if none are."""
    for block, digest in zip(blocks, digests, strict=False):  # sets of before have no digests
        samples, files = list(block), BlockFiles()
        for source, number in samples:
            files.add(source, number)
        if files.digest != digest:
            (first, at), (last, end) = samples[0], samples[-1]
            return f"a file of a sample from {first.where(at)} to {last.where(end)}"
    return None


def first_written_after(source: Input, since: int) -> Path | None:
    """The first file of an input that was written after a time (`st_mtime_ns`); None if none was."""
    for path in _files(source):
        with suppress(OSError, ValueError):
            if path.stat().st_mtime_ns > since:
                return path
    return None


def _files(source: Input) -> Iterator[Path]:
    """Files of all samples; one that follows itself, as a tar does, is named once."""
    last = None
    for number in range(len(source)):
        for path in source.files_of(number):
            if path != last:
                yield path
            last = path
