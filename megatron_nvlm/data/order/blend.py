"""Which set the i-th sample of a run comes from: a fixed schedule, exact weights, any place reached at once.

After any number of samples, each set has given its share to within one. A set's j-th sample (from 0) may stand where the
set's share has passed j and must stand before it passes j + 1; among the samples that may stand at a place the one whose
limit comes first takes it (earliest deadline first, which finds a schedule whenever there is one; that there is one
is Tijdeman's chairman assignment theorem).

Weights are exact fractions, so the schedule repeats after their common denominator. A short period is laid out once. A
long one is never laid out: it is cut into blocks whose first counts are the shares rounded by a closed form, and only the
blocks in use are held.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

from megatron_nvlm.errors import UserError

LONGEST_PERIOD = 1 << 18
"""A period up to this is one block."""
SHORTEST_BLOCK = 1 << 14
LONGEST_BLOCK = 1 << 20
_BLOCKS_HELD = 4


@dataclass(frozen=True)
class _Block:
    """Places of a block: the set, and how many of that set stand before it in the run."""

    sets: np.ndarray
    before: np.ndarray


class Blend:
    """A schedule over several sets.

    Args:
        weights: share of each set, in any unit, as written: 0.1 is a tenth exactly. Sets of weight 0 give nothing.

    Raises:
        UserError: a weight is negative or none is above 0, or one is so small beside the others that a block would be
            too long (under about two in a million, unless the period is short).
    """

    def __init__(self, weights: Sequence[float], longest_period: int = LONGEST_PERIOD) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        if not exact or min(exact) < 0 or sum(exact) <= 0:
            raise UserError("data.train: every set needs a weight of 0 or more, and one must be above 0")
        shares = [weight / sum(exact) for weight in exact]
        self.period = lcm(*(share.denominator for share in shares))
        self.counts = [int(share * self.period) for share in shares]
        """Samples of each set in a period."""
        self.block = self.period if self.period <= longest_period else self._choose_block(weights)
        self._like_weights = self._group()
        self._blocks: OrderedDict[int, _Block] = OrderedDict()

    def _group(self) -> list[list[int]]:
        """Sets by weight, the heaviest first; a group's weights lie within a factor of two."""
        groups: list[list[int]] = []
        for k in sorted(range(len(self.counts)), key=lambda k: (-self.counts[k], k)):
            if groups and self.counts[groups[-1][0]] < 2 * self.counts[k]:
                groups[-1].append(k)
            else:
                groups.append([k])
        return groups

    def _choose_block(self, weights: Sequence[float]) -> int:
        """Long enough that every set stands in every block at least once, whichever way its share is rounded."""
        smallest = min(count for count in self.counts if count)
        block = SHORTEST_BLOCK
        while block * smallest < 2 * self.period:
            block *= 2
        if block > LONGEST_BLOCK:
            weight = weights[self.counts.index(smallest)]
            raise UserError(
                f"data.train: the weight {weight} is {smallest / self.period:.1e} of all, too small to blend exactly "
                f"with the others; raise it to at least {2 / LONGEST_BLOCK:.0e} of all or leave that set out"
            )
        return block

    def __call__(self, i: int) -> tuple[int, int]:
        """(set, how many samples of that set stand before place i)."""
        number, place = divmod(i, self.block)
        if self.block == self.period:
            block = self._get(0)
            chosen = int(block.sets[place])
            return chosen, number * self.counts[chosen] + int(block.before[place])
        block = self._get(number)
        return int(block.sets[place]), int(block.before[place])

    def place_of(self, chosen: int, taken: int) -> int:
        """The place of a set's sample before which `taken` others of it stand: the inverse of a call."""
        place, step = taken * self.period // self.counts[chosen], 1
        while True:
            found, before = self(place)
            if found == chosen:
                if before == taken:
                    return place
                step = 1 if before < taken else -1
            place += step

    def counts_at(self, time: int) -> list[int]:
        """Samples of each set before place `time`, at the bounds of blocks: each share rounded up or down.

        Which are rounded up must leave no crowd of sets whose next sample is due at once. So sets of like weight are
        rounded together: as many of them go up as their remainders amount to, largest remainder first.
        """
        parts = [divmod(time * count, self.period) for count in self.counts]
        counted = [whole for whole, _ in parts]
        remainders = raised = 0
        for group in self._like_weights:
            remainders += sum(parts[k][1] for k in group)
            wanted = (2 * remainders + self.period) // (2 * self.period) - raised
            candidates = sorted((k for k in group if parts[k][1]), key=lambda k: (-parts[k][1], k))
            for k in candidates[: max(0, wanted)]:
                counted[k] += 1
                raised += 1
        # Groups with too few remainders to raise leave the rest to the largest remainders of all.
        left = sorted((k for k, whole in enumerate(counted) if whole == parts[k][0]), key=lambda k: (-parts[k][1], k))
        for k in left[: time - sum(counted)]:
            counted[k] += 1
        return counted

    def _get(self, number: int) -> _Block:
        if number not in self._blocks:
            self._blocks[number] = self._lay_out(number * self.block, (number + 1) * self.block)
            if len(self._blocks) > _BLOCKS_HELD:
                self._blocks.popitem(last=False)
        return self._blocks[number]

    def _lay_out(self, start: int, end: int) -> _Block:
        """Places [start, end), by earliest deadline first."""
        taken, last = self.counts_at(start), self.counts_at(end)
        sets = np.empty(end - start, dtype=np.int32)
        before = np.empty(end - start, dtype=np.int64)
        period, counts = self.period, self.counts
        ready: list[tuple[int, int]] = []  # (deadline, set)
        later: list[tuple[int, int]] = []  # (first place, set)

        def announce(k: int, place: int) -> None:
            """The set's next sample, if the block has one more."""
            j = taken[k]
            if j < last[k]:
                opens = j * period // counts[k]
                if opens <= place:
                    heapq.heappush(ready, (-(-(j + 1) * period // counts[k]), k))
                else:
                    heapq.heappush(later, (opens, k))

        for k in range(len(counts)):
            announce(k, start)
        for place in range(start, end):
            while later and (later[0][0] <= place or not ready):
                _, k = heapq.heappop(later)
                heapq.heappush(ready, (-(-(taken[k] + 1) * period // counts[k]), k))
            _, chosen = heapq.heappop(ready)
            sets[place - start], before[place - start] = chosen, taken[chosen]
            taken[chosen] += 1
            announce(chosen, place + 1)
        assert taken == last
        return _Block(sets, before)
