"""Which sample is the i-th of a run: a pure function of the seed, the blend and i. Nothing else is a data position.

Shuffling is a keyed bijection (a Feistel network walked until it lands inside the set), so no list of numbers is kept;
blending is a fixed schedule in which, after any number of samples, each set is within one of its share.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

from megatron_nvlm.errors import UserError

_ROUNDS = 4
_MASK = 0xFFFFFFFF


def _round_keys(seed: int, epoch: int, dataset: int) -> tuple[int, ...]:
    digest = hashlib.sha256(f"{seed} {epoch} {dataset}".encode()).digest()
    return tuple(int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(_ROUNDS))


def _mix(value: int, key: int) -> int:
    """A 32-bit hash of value and key (the finaliser of MurmurHash3)."""
    value = ((value ^ key) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def shuffled(position: int, size: int, keys: Sequence[int]) -> int:
    """The `position`-th number of a pseudo-random order of 0 .. size - 1."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half = (1 << half_bits) - 1
    while True:
        left, right = position >> half_bits, position & half
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & half)
        position = (left << half_bits) | right
        if position < size:
            return position


@dataclass(frozen=True)
class SampleId:
    """A sample by set and number, and which pass over its set this is."""

    dataset: int
    number: int
    epoch: int


class BlendedOrder:
    """The order of a run over several sets.

    Args:
        sizes: samples of each set.
        weights: share of each set, in any unit; not all 0.
        seed: of the run.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if len(sizes) != len(weights) or any(weight < 0 for weight in weights) or sum(weights) <= 0:
            raise UserError("data.train: every set needs a weight of 0 or more, and one must be above 0")
        self.sizes, self.seed = tuple(sizes), seed
        exact = [Fraction(str(weight)).limit_denominator(1000) for weight in weights]
        total = sum(exact)
        shares = [weight / total for weight in exact]
        self.period = lcm(*(share.denominator for share in shares))
        self.counts = [int(share * self.period) for share in shares]
        self.schedule, self.before = self._lay_out()
        self._keys: dict[tuple[int, int], tuple[int, ...]] = {}

    def _lay_out(self) -> tuple[np.ndarray, np.ndarray]:
        """One period: which set stands at each place, and how many of that set stand before it."""
        schedule = np.empty(self.period, dtype=np.int32)
        before = np.empty(self.period, dtype=np.int64)
        taken = [0] * len(self.counts)
        for place in range(self.period):
            # Earliest deadline first among the sets whose next sample is due keeps each within one of its share.
            due = [
                (-(-(taken[k] + 1) * self.period // count), k)
                for k, count in enumerate(self.counts)
                if count and taken[k] * self.period < (place + 1) * count
            ]
            _, chosen = min(due)
            schedule[place], before[place] = chosen, taken[chosen]
            taken[chosen] += 1
        return schedule, before

    def __call__(self, i: int) -> SampleId:
        """The i-th sample of the run, from 0."""
        period, place = divmod(i, self.period)
        dataset = int(self.schedule[place])
        taken = period * self.counts[dataset] + int(self.before[place])
        epoch, position = divmod(taken, self.sizes[dataset])
        if (dataset, epoch) not in self._keys:
            self._keys[dataset, epoch] = _round_keys(self.seed, epoch, dataset)
        return SampleId(dataset, shuffled(position, self.sizes[dataset], self._keys[dataset, epoch]), epoch)
