"""Named ranges of a step: seen by PyTorch's profiler, and on CUDA as NVTX ranges by Nsight Systems.

A range costs microseconds and makes no device wait.
"""

from types import TracebackType
from typing import Any

import torch

PREFIX = "step/"
"""Names of ranges begin so in a trace, which keeps them apart from operations."""
DATA, VISION, FORWARD, BACKWARD, MESSAGES, GRADIENTS, OPTIMIZER, METRICS, VALIDATION, SAVE = RANGES = (
    *("data", "vision", "forward", "backward", "messages", "gradients", "optimizer", "metrics", "validation", "save"),
)


def _has_nvtx() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_initialized()


class NamedRange:
    """A range around a `with` block, or between `start` and `stop`; the same object may be used again and again."""

    def __init__(self, name: str) -> None:
        self.name = PREFIX + name
        self._open: list[Any] = []

    def start(self, barrier: bool = False) -> None:
        """Begin. `barrier` is of Megatron-core's timers and has no effect: nobody waits for other ranks."""
        record = torch.profiler.record_function(self.name)
        record.__enter__()
        if _has_nvtx():
            torch.cuda.nvtx.range_push(self.name)
        self._open.append(record)

    def stop(self, barrier: bool = False) -> None:
        """End the range that was begun last."""
        record = self._open.pop()
        if _has_nvtx():
            torch.cuda.nvtx.range_pop()
        record.__exit__(None, None, None)

    def __enter__(self) -> "NamedRange":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class _NoRange:
    """What stands for a timer of core's that is no range."""

    def start(self, barrier: bool = False) -> None:
        """Nothing."""

    def stop(self, barrier: bool = False) -> None:
        """Nothing."""


class CoreRanges:
    """Stands where Megatron-core's configuration has its timers: its schedules then mark forward, backward and messages."""

    def __init__(self) -> None:
        self._ranges = {"forward-compute": NamedRange(FORWARD), "backward-compute": NamedRange(BACKWARD)}
        self._messages, self._none = NamedRange(MESSAGES), _NoRange()

    def __call__(self, name: str, log_level: int | None = None) -> NamedRange | _NoRange:
        """The range for one of core's names; of those for messages between stages one range, of all others none."""
        if name.endswith(("-recv", "-send")):
            return self._messages
        return self._ranges.get(name, self._none)
