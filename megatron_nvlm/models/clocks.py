"""How long a rank worked, and how many tiles it encoded, without making an accelerator wait."""

import time
from types import TracebackType
from typing import Any

import torch


class DeviceClock:
    """Runs between `start` and `stop`, as often as asked; `take_seconds` reads it and sets it back."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._began: Any = None
        self._events: list[tuple[Any, Any]] = []
        self._on_accelerator = torch.accelerator.is_available()

    def start(self) -> None:
        """Let it run."""
        self._began = self._now()

    def stop(self) -> None:
        """Let it stand; a clock that stands already goes on standing."""
        if self._began is None:
            return
        if self._on_accelerator:
            self._events.append((self._began, self._now()))
        else:
            self._seconds += self._now() - self._began
        self._began = None

    def _now(self) -> Any:
        """A time, or on an accelerator a mark in its queue of work."""
        if not self._on_accelerator:
            return time.perf_counter()
        event = torch.Event(enable_timing=True)
        event.record()
        return event

    def take_seconds(self) -> float:
        """Seconds since the last call; on an accelerator it waits for marks that have not been passed."""
        for began, ended in self._events:
            if not ended.query():
                ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        taken = self._seconds
        self._seconds, self._events = 0.0, []
        return taken


class VisionClock(DeviceClock):
    """Runs inside `with` blocks; `take` reads it and sets it back."""

    def __init__(self) -> None:
        super().__init__()
        self.tiles = 0

    def __enter__(self) -> "VisionClock":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def take(self) -> tuple[int, float]:
        """(tiles encoded, seconds) since the last call."""
        taken = self.tiles, self.take_seconds()
        self.tiles = 0
        return taken
