"""Shapes of the messages between pipeline stages, known on each stage from the micro-batches that all of them hold."""

from collections import deque
from collections.abc import Iterator, Sequence

from torch import Tensor

Shape = Sequence[int]


class MessageShapes:
    """Of one pass of a step's micro-batches through a pipeline without virtual stages; first in, first out both ways.

    Args:
        forward: shape of what the stage before sends, for each micro-batch in order.
    """

    def __init__(self, forward: Iterator[Shape]) -> None:
        self._forward = forward
        self._sent: deque[Shape] = deque()
        """Of messages whose gradient has not come back."""

    def exchange(
        self, send_next: Tensor | None, send_previous: Tensor | None, from_previous: bool, from_next: bool
    ) -> tuple[list[int] | None, list[int] | None]:
        """Shapes of what comes from the stage before and from the one after; arguments as of core's exchange of shapes."""
        if send_next is not None:
            self._sent.append(tuple(send_next.shape))
        return (
            list(next(self._forward)) if from_previous else None,
            list(self._sent.popleft()) if from_next else None,
        )
