"""Which sample is the i-th of a run: a pure function of the seed, the blend and i. Nothing else is a data position."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_nvlm.data.order.blend import Blend
from megatron_nvlm.data.order.shuffle import SetOrder
from megatron_nvlm.errors import UserError

WINDOW_SHARDS = 8
"""Shards of a window by default (our choice): enough to mix sources that lie shard by shard, few enough to cache."""


@dataclass(frozen=True)
class SampleId:
    """A sample by set and number, and which pass over its set this is."""

    dataset: int
    number: int
    epoch: int


class BlendedOrder:
    """The order of a run over several sets.

    Args:
        sets: samples of each set; or of each of its shards, which are then shuffled by shard and within windows.
        weights: share of each set, in any unit; not all 0.
        seed: of the run.
        window_shards: shards whose samples are shuffled among each other.
    """

    def __init__(
        self,
        sets: Sequence[int | Sequence[int]],
        weights: Sequence[float],
        seed: int,
        window_shards: int = WINDOW_SHARDS,
    ) -> None:
        if len(sets) != len(weights):
            raise UserError("data.train: every set needs a weight of 0 or more, and one must be above 0")
        self.blend = Blend(weights)
        self.sets = [
            SetOrder([sizes] if isinstance(sizes, int) else sizes, (seed, number), window_shards)
            for number, sizes in enumerate(sets)
        ]

    def __call__(self, i: int) -> SampleId:
        """The i-th sample of the run, from 0."""
        dataset, taken = self.blend(i)
        epoch, number = self.sets[dataset](taken)
        return SampleId(dataset, number, epoch)

    def places_of_epoch(self) -> int:
        """Places of an epoch: the first in which the set that lasts longest at its share is read once.

        That is the set of the largest size / weight; of several, all are read once.
        """
        lasting = {
            number: Fraction(one.size * self.blend.period, count)
            for number, (one, count) in enumerate(zip(self.sets, self.blend.counts, strict=True))
            if count
        }
        longest = [number for number, places in lasting.items() if places == max(lasting.values())]
        return 1 + max(self.blend.place_of(number, self.sets[number].size - 1) for number in longest)
