"""Micro-batches of a step, as a pure function of the data's position; workers prepare ahead and change nothing.

A bad sample is skipped: its place of the order stays empty, so every other sample still comes exactly once an epoch, and
ranks need not agree on anything, since each sees the same bytes. (Taking the next sample in its place, as other loaders
do, would show that one twice.) Its micro-batch is shorter; one without any sample is one token that is no target. Ranks
that share the tiles of a step do agree (shared_decoding.py).
"""

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from megatron_nvlm.data.config import DataConfig
from megatron_nvlm.data.loading.builder import BatchSettings, ListedData, MicroBatchBuilder, OpenedData
from megatron_nvlm.data.loading.fetch import BadRecord
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.data.prepare import PreparedSample
from megatron_nvlm.sequence.micro_batch import MicroBatch


class Loader(Protocol):
    """The training data of one rank."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step on this rank."""

    @property
    def bad(self) -> list[BadRecord]:
        """Bad samples of the step that was drawn last, on this rank."""

    def after(self, position: DataPosition) -> DataPosition:
        """Where the step after this one begins."""

    def step(self, position: DataPosition) -> Iterator[MicroBatch]:
        """The micro-batches of this rank for the step that begins at `position`."""

    def close(self) -> None:
        """End the workers, if there are any."""


class MicroBatchLoader:
    """A loader whose rank reads and decodes all of its samples. With workers, close it when done."""

    def __init__(self, data: OpenedData | ListedData, batch: BatchSettings, config: DataConfig) -> None:
        self.builder = MicroBatchBuilder(data, batch, config)
        self._ahead: deque[tuple[int, ...]] = deque()
        """Micro-batches that were asked for, as tickets."""
        self._micro_batches: Iterator[tuple[int, ...]] = iter(())
        self._expected: tuple[DataPosition, int] | None = None

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step on this rank."""
        return self.builder.num_micro_batches

    @property
    def bad(self) -> list[BadRecord]:
        """Bad samples of the step that was drawn last, on this rank."""
        return self.builder.bad

    def after(self, position: DataPosition) -> DataPosition:
        """Where the step after this one begins."""
        return self.builder.plan.step(position).after

    def step(self, position: DataPosition) -> Iterator[MicroBatch]:
        """The micro-batches of this rank for the step that begins at `position`.

        Raises:
            UserError: a shard cannot be reached or a worker died.
        """
        if self._expected != (position, 0):
            self._start_at(position)
        self.builder.bad = []
        for drawn in range(1, self.num_micro_batches + 1):
            # Noted before the micro-batch is drawn, so that a step left half-way is seen as such by the next.
            self._expected = (position, drawn)
            yield self._next()
        self._expected = (self.after(position), 0)

    def close(self) -> None:
        """End the workers."""
        self.builder.preparers.close()

    def _start_at(self, position: DataPosition) -> None:
        self.builder.preparers.forget([ticket for tickets in self._ahead for ticket in tickets])
        self._ahead.clear()
        self._micro_batches = self._micro_batches_from(position)

    def _micro_batches_from(self, position: DataPosition) -> Iterator[tuple[int, ...]]:
        """This rank's micro-batches, without end."""
        while True:
            step = self.builder.plan.step(position)
            yield from self.builder.own_micro_batches(step)
            position = step.after

    def _next(self) -> MicroBatch:
        preparers = self.builder.preparers
        waiting = sum(len(tickets) for tickets in self._ahead)
        while not self._ahead or (preparers.works_ahead and waiting < self.builder.config.prefetch_samples):
            tickets = self._ask(next(self._micro_batches))
            self._ahead.append(tickets)
            waiting += max(1, len(tickets))
        tickets = self._ahead.popleft()
        samples = self._keep(preparers.collect(ticket) for ticket in tickets)
        micro_batch = self.builder.build(samples, keep_tiles=not preparers.works_ahead)
        for ticket in tickets:  # only now, since tiles were copied straight from the shared memory
            preparers.release(ticket)
        return micro_batch

    def _ask(self, places: tuple[int, ...]) -> tuple[int, ...]:
        """The tickets of the samples at these places."""
        tickets = []
        micro_batch_room = 0
        for place in places:
            room = self.builder.most_tiles(place)
            micro_batch_room += room
            if micro_batch_room > self.builder.preparers.most_tiles:
                room = 0  # the whole micro-batch must have room at once; what has none comes through the pipe
            tickets.append(self.builder.preparers.submit(self.builder.request(place), room))
        return tuple(tickets)

    def _keep(self, results: Iterator[PreparedSample | BadRecord]) -> list[PreparedSample]:
        good = []
        for result in results:
            if isinstance(result, BadRecord):
                self.builder.skip(result)
            else:
                good.append(result)
        return good
