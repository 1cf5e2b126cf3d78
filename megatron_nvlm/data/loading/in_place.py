"""Preparing samples in this process, when they are collected; and what that has in common with a pool of workers."""

from collections.abc import Sequence
from typing import Protocol

from megatron_nvlm.data.loading.fetch import BadRecord, SampleRequest, fetch
from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.data.shards.read import ShardSet


class Preparers(Protocol):
    """Who prepares samples for a loader: this process (InPlace) or others (worker_pool.py)."""

    works_ahead: bool
    """Whether samples are prepared before they are collected, and their tiles lie in memory that is lent until released."""

    @property
    def most_tiles(self) -> int:
        """Tiles that may be lent at once."""

    def submit(self, request: SampleRequest, room: int) -> int:
        """Ask for a sample with at most this number of tiles; returns its number. Ask in the order of use."""

    def collect(self, number: int) -> PreparedSample | BadRecord:
        """Wait for a sample."""

    def release(self, number: int) -> None:
        """Give back what a collected sample holds."""

    def forget(self, numbers: Sequence[int]) -> None:
        """Samples that are not wanted any more."""

    def close(self) -> object:
        """End what works."""


class InPlace:
    """Prepares a sample when it is collected."""

    works_ahead = False
    most_tiles = 0

    def __init__(self, sets: Sequence[ShardSet], pipeline: SamplePipeline) -> None:
        self.sets, self.pipeline = sets, pipeline
        self._requests: dict[int, SampleRequest] = {}
        self._next = 0

    def submit(self, request: SampleRequest, room: int) -> int:
        """Note a sample."""
        number, self._next = self._next, self._next + 1
        self._requests[number] = request
        return number

    def collect(self, number: int) -> PreparedSample | BadRecord:
        """Prepare a sample."""
        return fetch(self.sets, self.pipeline, self._requests[number])

    def release(self, number: int) -> None:
        """Forget a collected sample."""
        del self._requests[number]

    def forget(self, numbers: Sequence[int]) -> None:
        """Forget samples that were not collected."""
        for number in numbers:
            del self._requests[number]

    def close(self) -> None:
        """Forget all."""
        self._requests.clear()
