"""Several samples in one pack: bins of a window of the order, balanced by tokens and by tiles, from sizes alone.

Every pack costs the step as much as the longest one (tokens) and as the one with most pictures (tiles), so both are spread
evenly. Our choice; the paper's runs do not pack.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_nvlm.data.order.lengths import SampleSizes
from megatron_nvlm.data.order.shuffle import all_shuffled, round_keys


@dataclass(frozen=True)
class PackingConfig:
    """Section `data.packing` of a run."""

    enabled: bool = False
    """Fill packs up to data.sequence_length with several samples; training.global_batch_size then counts packs."""
    window_samples: int = 1024
    """Samples of the order that are packed among each other; more fill packs better and mix less locally."""


def pack_window(sizes: SampleSizes, pack_length: int, seed: Sequence[int] = (0,)) -> list[list[int]]:
    """Packs of samples, by their places in `sizes`; each place stands in exactly one pack.

    No pack is longer than `pack_length`; there are about as few packs as best fit decreasing finds. Samples of 0 tokens
    (known to be bad) are dealt out, so that reading them counts them.

    Args:
        seed: of the order of the packs, which would otherwise run from long to short samples.
    """
    real = np.flatnonzero(sizes.tokens > 0)
    by_length = sorted(real.tolist(), key=lambda place: (-sizes.tokens[place], -sizes.tiles[place], place))
    tight = _best_fit(sizes, by_length, pack_length)
    fewest = -(-int(sizes.tokens.sum()) // pack_length)
    packs = None
    spare = len(tight) // 50  # two in a hundred packs more are worth an even load
    for count in sorted({fewest, len(tight), len(tight) + min(1, spare), len(tight) + spare}):
        packs = packs or _spread(sizes, by_length, pack_length, count)
    packs = packs or tight or [[]]
    for turn, place in enumerate(np.flatnonzero(sizes.tokens <= 0).tolist()):
        packs[turn % len(packs)].append(place)
    return [sorted(packs[number]) for number in all_shuffled(len(packs), round_keys(*seed))]


def _best_fit(sizes: SampleSizes, by_length: Sequence[int], pack_length: int) -> list[list[int]]:
    """Best fit decreasing: each sample into the fullest pack that holds it."""
    free = np.full(len(by_length), pack_length, dtype=np.int64)
    packs: list[list[int]] = []
    for place in by_length:
        length = sizes.tokens[place]
        open_packs = free[: len(packs)]
        left = np.where(open_packs >= length, open_packs, pack_length + 1)
        best = int(left.argmin()) if len(packs) else 0
        if not packs or left[best] > pack_length:
            best = len(packs)
            packs.append([])
        packs[best].append(place)
        free[best] -= length
    return packs


def _spread(sizes: SampleSizes, by_length: Sequence[int], pack_length: int, count: int) -> list[list[int]] | None:
    """`count` packs, each sample into the one that stays least loaded in tokens and tiles; None if one does not fit."""
    if count == 0:
        return None
    mean_tokens = max(sizes.tokens.sum() / count, 1)
    mean_tiles = max(sizes.tiles.sum() / count, 1)
    tokens, tiles = np.zeros(count), np.zeros(count)
    packs: list[list[int]] = [[] for _ in range(count)]
    for place in by_length:
        new_tokens = tokens + sizes.tokens[place]
        load = np.maximum(new_tokens / mean_tokens, (tiles + sizes.tiles[place]) / mean_tiles)
        load += 1e-3 * (new_tokens / mean_tokens)  # of equals in the worse of the two, the shorter pack
        load[new_tokens > pack_length] = np.inf
        best = int(load.argmin())
        if load[best] == np.inf:
            return None
        packs[best].append(place)
        tokens[best] += sizes.tokens[place]
        tiles[best] += sizes.tiles[place]
    return packs
