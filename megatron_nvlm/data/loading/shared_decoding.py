"""A loader whose rank decodes its share of a step's tiles only, among the ranks that encode them together.

Tokens need no pixels: sizes of images stand in the index. So every rank, which reads and tokenises all samples of a step,
knows their tokens and tiles, and with it whose tile is whose. Only the ranks that decode a broken image learn that it is
broken. They tell the others, all drop its sample and share the remaining tiles again, until nobody finds another. The
micro-batches are those of a loader that decodes everything, on any number of ranks.

Workers read the tokens of the step after next, and then decode this rank's share of the next, while a step is computed.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_nvlm.data.config import DataConfig
from megatron_nvlm.data.loading.builder import BatchSettings, ListedData, MicroBatchBuilder, OpenedData
from megatron_nvlm.data.loading.fetch import BadRecord
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.data.prepare import PreparedSample
from megatron_nvlm.ops.gather_tiles import share_of
from megatron_nvlm.sequence.micro_batch import MicroBatch

Found = tuple[int, int, BadRecord]
"""A bad sample: its place of the order, the first of its tiles that was asked for, and what is wrong."""

_NOTHING = (0, 0)
"""The part of a sample's tiles to ask for where only its tokens are wanted."""


@dataclass(frozen=True)
class TileShare:
    """Which share of the tiles is a rank's."""

    index: int
    ranks: int
    gather: Callable[[list[Found]], list[Found]]
    """What all ranks that share have found; each of them calls it equally often."""


@dataclass
class _Step:
    """A step on its way. Samples go by their places of the order, tickets are the preparers' numbers."""

    position: DataPosition
    after: DataPosition
    micro_batches: tuple[tuple[int, ...], ...]
    token_tickets: dict[int, int]
    tile_tickets: dict[int, int] = field(default_factory=dict)
    samples: dict[int, PreparedSample] = field(default_factory=dict)
    """The good ones, in order; without tiles."""
    bad: dict[int, BadRecord] = field(default_factory=dict)
    parts: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Range of each sample's tiles that is this rank's, where that is not empty."""
    decoded: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
    """(number in the sample of the first, tiles)."""

    @property
    def tickets(self) -> list[int]:
        """Those not collected."""
        return [*self.token_tickets.values(), *self.tile_tickets.values()]

    def has(self, place: int) -> bool:
        """Whether this rank's part of a sample is decoded."""
        if place not in self.decoded:
            return False
        start, end = self.parts[place]
        first, tiles = self.decoded[place]
        return first <= start and end <= first + len(tiles)

    def own_tiles(self, place: int) -> np.ndarray:
        """This rank's part of a sample's tiles."""
        start, end = self.parts[place]
        first, tiles = self.decoded[place]
        return tiles[start - first : end - first]

    def drop(self, found: list[Found]) -> None:
        """Leave bad samples out; of several faults of one sample, the first counts, as for a rank that decodes it whole."""
        for place, _, bad in sorted(found, key=lambda one: one[:2]):
            self.bad.setdefault(place, bad)
            self.samples.pop(place, None)


class SharingLoader:
    """A loader for ranks that encode the tiles of a step together; its micro-batches hold this rank's share of them.

    Args:
        share: this rank's.
    """

    def __init__(
        self, share: TileShare, data: OpenedData | ListedData, batch: BatchSettings, config: DataConfig
    ) -> None:
        self.builder = MicroBatchBuilder(data, batch, config)
        self.share = share
        self._steps: deque[_Step] = deque()
        """The next steps, as far as they were asked for."""

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

    def close(self) -> None:
        """End the workers."""
        self.builder.preparers.close()

    def step(self, position: DataPosition) -> Iterator[MicroBatch]:
        """The micro-batches of this rank; all ranks that share draw the same steps.

        Raises:
            UserError: a shard cannot be reached or a worker died.
        """
        if not self._steps or self._steps[0].position != position:
            for forgotten in self._steps:
                self.builder.preparers.forget(forgotten.tickets)
            self._steps = deque([self._begin(position)])
        step = self._steps.popleft()
        self._decode_share(step)
        self.builder.bad = []
        for place in (place for micro_batch in step.micro_batches for place in micro_batch if place in step.bad):
            self.builder.skip(step.bad[place])
        if self.builder.preparers.works_ahead:
            self._look_ahead(step.after)
        for micro_batch in step.micro_batches:
            yield self._build_micro_batch(step, micro_batch)

    def _begin(self, position: DataPosition) -> _Step:
        """Ask for the tokens of a step."""
        planned = self.builder.plan.step(position)
        micro_batches = self.builder.own_micro_batches(planned)
        tickets = {
            place: self.builder.preparers.submit(self.builder.request(place, _NOTHING), 0)
            for micro_batch in micro_batches
            for place in micro_batch
        }
        return _Step(position, planned.after, micro_batches, tickets)

    def _look_ahead(self, position: DataPosition) -> None:
        """Ask for the tokens of the step that begins there and of the one after, and for this rank's tiles of the first."""
        while len(self._steps) < 2:
            self._steps.append(self._begin(self._steps[-1].after if self._steps else position))
        self._ask_for_share(self._steps[0])

    def _decode_share(self, step: _Step) -> None:
        """Until all ranks have their shares of the tiles of good samples."""
        while True:
            self._ask_for_share(step)
            found = self.share.gather(self._collect_tiles(step))
            if not found:
                return
            step.drop(found)

    def _ask_for_share(self, step: _Step) -> None:
        """Ask for the tiles that are this rank's by the samples that are known to be good."""
        self._collect_tokens(step)
        step.parts = self._own_parts(step)
        for place, (start, end) in step.parts.items():
            if place not in step.tile_tickets and not step.has(place):
                step.tile_tickets[place] = self.builder.preparers.submit(
                    self.builder.request(place, (start, end)), end - start
                )

    def _collect_tokens(self, step: _Step) -> None:
        """Take the tokens in that were asked for; what is bad without decoding is so on every rank."""
        for place, ticket in step.token_tickets.items():
            result = self.builder.preparers.collect(ticket)
            if isinstance(result, BadRecord):
                step.drop([(place, 0, result)])
            else:
                step.samples[place] = result
            self.builder.preparers.release(ticket)
        step.token_tickets.clear()

    def _own_parts(self, step: _Step) -> dict[int, tuple[int, int]]:
        total = sum(sample.sequence.num_tiles for sample in step.samples.values())
        start, end = share_of(total, self.share.ranks, self.share.index)
        parts, before = {}, 0
        for place, sample in step.samples.items():
            number = sample.sequence.num_tiles
            part = max(start - before, 0), min(end - before, number)
            if part[0] < part[1]:
                parts[place] = part
            before += number
        return parts

    def _collect_tiles(self, step: _Step) -> list[Found]:
        """Take in what was asked for, in the order of asking; returns what was bad."""
        found: list[Found] = []
        for place, ticket in step.tile_tickets.items():
            result = self.builder.preparers.collect(ticket)
            if isinstance(result, BadRecord):
                found.append((place, step.parts[place][0], result))
            else:
                # Lent memory goes back at once: a share may be larger than it.
                tiles = result.tiles.copy() if self.builder.preparers.works_ahead else result.tiles
                step.decoded[place] = step.parts[place][0], tiles
            self.builder.preparers.release(ticket)
        step.tile_tickets.clear()
        return found

    def _build_micro_batch(self, step: _Step, places: tuple[int, ...]) -> MicroBatch:
        good = [place for place in places if place in step.samples]
        own = [place for place in good if place in step.parts]
        samples = [
            replace(step.samples[place], tiles=step.own_tiles(place)) if place in step.parts else step.samples[place]
            for place in good
        ]
        first_tile = 0
        if own:
            before = good[: good.index(own[0])]
            first_tile = sum(step.samples[place].sequence.num_tiles for place in before) + step.parts[own[0]][0]
        return self.builder.build(samples, first_tile=first_tile)
