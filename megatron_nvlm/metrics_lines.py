"""Reads a file of JSON lines (metrics.jsonl) while a run appends to it, and takes numbers out of its steps."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class News:
    """What a look at a file found."""

    records: list[dict[str, Any]]
    """Complete lines that were not there before, in order."""
    begins_again: bool
    """Whether the file was cut since the last look, as a resumed run does: `records` then begins with its first line."""


class LineFollower:
    """Reads only what was appended since the last look, and everything again after the file was cut.

    Half a line, of a writer that is not done or was killed, waits until it is whole. A line that is no JSON object is
    left out.

    Args:
        most_bytes: read in one look, more than any line has; -1 for all there is.
    """

    def __init__(self, path: Path, most_bytes: int = -1) -> None:
        self.path = path
        self.most_bytes = most_bytes
        self._end = 0
        """Bytes read: the end of the last complete line."""
        self._last = b""
        """The last complete line, which is still at its place as long as the file was not cut."""

    def read(self) -> News:
        """What is new; nothing for a file that is not there."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            again, self._end, self._last = self._end > 0, 0, b""
            return News([], again)
        with file:
            file.seek(self._end - len(self._last))
            again = file.read(len(self._last)) != self._last
            if again:
                file.seek(0)
                self._end, self._last = 0, b""
            lines = file.read(self.most_bytes).splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if lines:
            self._end += sum(map(len, lines))
            self._last = lines[-1]
        return News([record for line in lines if (record := _record(line)) is not None], again)


def _record(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict):
            return record
    return None


def numbers_of(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers of a step by name, those of sections as `gates/layer_2`; texts, lists and truth values are left out."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(OverflowError):  # a whole number beyond all floats
                found[f"{prefix}{key}"] = float(value)
    return found


def is_step(record: Mapping[str, Any]) -> bool:
    """Whether a line is a step of a run."""
    return isinstance(record.get("step"), int)
