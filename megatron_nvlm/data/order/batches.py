"""Which samples make which micro-batch of a step: pure, the same on every rank, whatever the number of replicas or workers.

A step has a list of micro-batches; replica r of n takes micro-batches r, r + n, r + 2n, ... Its position is all that a
checkpoint keeps of the data.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_nvlm.data.order.lengths import LengthCounter, SampleSizes
from megatron_nvlm.data.order.order import BlendedOrder, SampleId
from megatron_nvlm.data.order.packing import PackingConfig, pack_window
from megatron_nvlm.data.shards.index import Index
from megatron_nvlm.errors import UserError


@dataclass(frozen=True)
class DataPosition:
    """The whole position of the data."""

    consumed_samples: int = 0
    """Places of the order that are done; with packing, those before the window in use."""
    packs_taken: int = 0
    """With packing, packs of that window that are done."""


@dataclass(frozen=True)
class PlannedStep:
    """Micro-batches of a step as places of the order, and where the next step begins."""

    micro_batches: tuple[tuple[int, ...], ...]
    after: DataPosition


class BatchPlan(Protocol):
    """Micro-batches of any step."""

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of a step, over all replicas."""

    def step(self, position: DataPosition) -> PlannedStep:
        """The step that begins there."""

    def num_steps(self, places: int) -> int:
        """The fewest steps from the beginning that hold all of the order's first places."""


@dataclass(frozen=True)
class UnpackedBatchPlan:
    """Every micro-batch holds `micro_batch_size` samples, one place of the order after the other."""

    micro_batch_size: int
    global_batch_size: int

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of a step, over all replicas."""
        return self.global_batch_size // self.micro_batch_size

    def step(self, position: DataPosition) -> PlannedStep:
        """The step that begins there."""
        start, size = position.consumed_samples, self.micro_batch_size
        micro_batches = tuple(tuple(range(at, at + size)) for at in range(start, start + self.global_batch_size, size))
        return PlannedStep(micro_batches, DataPosition(start + self.global_batch_size))

    def num_steps(self, places: int) -> int:
        """The fewest steps from the beginning that hold all of the order's first places."""
        return -(-places // self.global_batch_size)


class PackedBatchPlan:
    """Packs are filled from windows of the order; a step takes `global_batch_size` of them, over windows' bounds.

    Args:
        indexes: of the sets, whose text is counted as the run tokenises it.
    """

    def __init__(
        self,
        config: PackingConfig,
        order: BlendedOrder,
        indexes: Sequence[Index],
        counter: LengthCounter,
        global_batch_size: int,
    ) -> None:
        self.config, self.order, self.indexes, self.counter = config, order, indexes, counter
        self.micro_batches_per_step = global_batch_size
        self._windows: OrderedDict[int, list[tuple[int, ...]]] = OrderedDict()

    def step(self, position: DataPosition) -> PlannedStep:
        """The step that begins there."""
        packs: list[tuple[int, ...]] = []
        start, taken = position.consumed_samples, position.packs_taken
        while len(packs) < self.micro_batches_per_step:
            window = self.window(start)
            if taken >= len(window):
                raise UserError(
                    f"the checkpoint has taken {taken} packs of a window that has {len(window)}; data.packing, "
                    "data.sequence_length or the shards were changed since: set them back"
                )
            taken_now = window[taken : taken + self.micro_batches_per_step - len(packs)]
            packs += taken_now
            taken += len(taken_now)
            if taken == len(window):
                start, taken = start + self.config.window_samples, 0
        return PlannedStep(tuple(packs), DataPosition(start, taken))

    def num_steps(self, places: int) -> int:
        """The fewest steps from the beginning that hold all of the order's first places; it packs every window of them."""
        packs = 0
        for start in range(0, places, self.config.window_samples):
            window = self.window(start)
            last = start + self.config.window_samples >= places
            # Of the last window, packs after the last one with a place that counts are not needed.
            packs += max(
                number for number, pack in enumerate(window, 1) if not last or min(pack, default=places) < places
            )
        return -(-packs // self.micro_batches_per_step)

    def window(self, start: int) -> list[tuple[int, ...]]:
        """Packs of the window that begins at this place of the order."""
        if start not in self._windows:
            places = pack_window(self.sizes(start), self.counter.sequence_length, (start,))
            self._windows[start] = [tuple(start + place for place in pack) for pack in places]
            if len(self._windows) > 4:
                self._windows.popitem(last=False)
        return self._windows[start]

    def sizes(self, start: int) -> SampleSizes:
        """Sizes of the window's samples, in their order."""
        ids = [self.order(start + place) for place in range(self.config.window_samples)]
        return sizes_of(ids, self.indexes, self.counter)


def sizes_of(samples: Sequence[SampleId], indexes: Sequence[Index], counter: LengthCounter) -> SampleSizes:
    """Sizes of samples of several sets, in their order."""
    tokens = np.zeros(len(samples), dtype=np.int64)
    tiles = np.zeros(len(samples), dtype=np.int64)
    for dataset, index in enumerate(indexes):
        places = [place for place, sample in enumerate(samples) if sample.dataset == dataset]
        sizes = counter.sizes(index, [samples[place].number for place in places])
        tokens[places], tiles[places] = sizes.tokens, sizes.tiles
    return SampleSizes(tokens, tiles)
