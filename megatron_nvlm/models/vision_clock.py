"""How many tiles a rank encoded and how long that took, without making an accelerator wait."""

import time
from types import TracebackType
from typing import Any

import torch


class VisionClock:
    """Runs inside `with` blocks; `take` reads it and sets it back."""

    def __init__(self) -> None:
        self.tiles = 0
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._on_accelerator = torch.accelerator.is_available()

    def __enter__(self) -> "VisionClock":
        self._began: Any = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._on_accelerator:
            self._events.append((self._began, self._now()))
        else:
            self._seconds += self._now() - self._began

    def _now(self) -> Any:
        """A time, or on an accelerator a mark in its queue of work."""
        if not self._on_accelerator:
            return time.perf_counter()
        event = torch.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> tuple[int, float]:
        """(tiles encoded, seconds) since the last call; on an accelerator it waits for the marks to pass."""
        for began, ended in self._events:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        taken = self.tiles, self._seconds
        self.tiles, self._seconds, self._events = 0, 0.0, []
        return taken
