"""Samples read once in a fixed order, as validation does: every set in turn, images and text-only samples apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_nvlm.data.order.batches import DataPosition, PlannedStep, sizes_of
from megatron_nvlm.data.order.lengths import LengthCounter
from megatron_nvlm.data.order.order import SampleId
from megatron_nvlm.data.order.packing import PackingConfig, pack_window
from megatron_nvlm.data.shards.index import Index


@dataclass(frozen=True)
class ListedOrder:
    """Samples in the order in which they are read."""

    samples: tuple[SampleId, ...]
    group_sizes: tuple[int, ...]
    """Samples one after the other that are of one set and of one kind (with images, text only)."""

    def __call__(self, i: int) -> SampleId:
        """The i-th sample, from 0."""
        return self.samples[i]

    def __len__(self) -> int:
        return len(self.samples)


def list_samples(indexes: Sequence[Index], counts: Sequence[int | None]) -> ListedOrder:
    """All samples of each set, or a number of them that lie evenly spread over the set.

    Text-only samples of a set come after those with images, so that no micro-batch holds both: the text-only loss of
    NVLM-X and H can then equal that of their language model digit for digit.

    Args:
        counts: samples to take of each set; None, or more than it has, for all.
    """
    samples: list[SampleId] = []
    group_sizes: list[int] = []
    for dataset, (index, count) in enumerate(zip(indexes, counts, strict=True)):
        size = len(index.samples)
        count = size if count is None else min(count, size)
        numbers = np.arange(count) * size // count
        has_images = index.samples["num_images"][numbers] > 0
        for group in (numbers[has_images], numbers[~has_images]):
            samples += (SampleId(dataset, int(number), 0) for number in group)
            group_sizes.append(len(group))
    return ListedOrder(tuple(samples), tuple(group_sizes))


class ListedBatchPlan:
    """Micro-batches of a listed order, in rounds of one size; the last is filled up with micro-batches without samples.

    Positions count micro-batches.

    Args:
        micro_batches: as places of the order.
        most_per_round: micro-batches of a round, over all replicas, at most (but at least `multiple`).
        multiple: a round has a multiple of this number of micro-batches.
    """

    def __init__(self, micro_batches: Sequence[tuple[int, ...]], most_per_round: int, multiple: int) -> None:
        self.micro_batches = tuple(micro_batches)
        self.rounds = -(-len(micro_batches) // max(most_per_round, multiple))
        a_round = -(-len(micro_batches) // self.rounds)
        self.micro_batches_per_step = -(-a_round // multiple) * multiple

    def step(self, position: DataPosition) -> PlannedStep:
        """The round that begins there; after the last one, micro-batches without samples."""
        start, size = position.consumed_samples, self.micro_batches_per_step
        own = self.micro_batches[start : start + size]
        return PlannedStep(own + ((),) * (size - len(own)), DataPosition(start + size))

    def num_steps(self, places: int) -> int:
        """Rounds that hold the first places of the order."""
        count = sum(min(micro_batch, default=places) < places for micro_batch in self.micro_batches)
        return -(-count // self.micro_batches_per_step)


def list_micro_batches(
    order: ListedOrder, indexes: Sequence[Index], packing: PackingConfig, micro_batch_size: int, counter: LengthCounter
) -> list[tuple[int, ...]]:
    """Micro-batches of an order as places in it, made as training makes them; none holds samples of two groups."""
    micro_batches: list[tuple[int, ...]] = []
    begin = 0
    for size in order.group_sizes:
        places = range(begin, begin + size)
        begin += size
        step = packing.window_samples if packing.enabled else micro_batch_size
        for first in range(0, size, step):
            window = places[first : first + step]
            if not packing.enabled:
                micro_batches.append(tuple(window))
                continue
            sizes = sizes_of([order(place) for place in window], indexes, counter)
            packs = pack_window(sizes, counter.sequence_length, (first,))
            micro_batches += (tuple(window[place] for place in pack) for pack in packs)
    return micro_batches
