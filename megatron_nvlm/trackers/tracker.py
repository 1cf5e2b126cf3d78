"""What every tracker offers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, Protocol

StepNumbers = tuple[int, Mapping[str, float]]
"""A step and its metrics."""


class Ending(Enum):
    """How the training process ended that is tracked."""

    FINISHED = auto()
    STOPPED = auto()
    """Saved when asked; it may go on under the same id."""
    FAILED = auto()


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers are told of it."""

    name: str
    run_dir: Path
    settings: Mapping[str, Any]
    """The run file in force, as plain values."""


class Tracker(Protocol):
    """One tracker. Any method may raise any error, as without a network; it is then called again later."""

    @property
    def name(self) -> str:
        """In sentences and in trackers.json."""
        ...

    def open(self, run_id: str | None, run: TrackedRun) -> str:
        """Take up the run of this id, or begin a new one; returns its id."""
        ...

    def send(self, steps: Sequence[StepNumbers]) -> None:
        """Hand steps over, in their order."""
        ...

    def close(self, ending: Ending) -> None:
        """Hand the rest over and say how training ended."""
        ...
