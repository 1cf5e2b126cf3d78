"""Several samples in one row: bins of a window of the order, balanced by tokens and by tiles, from sizes alone.

Every row costs the step as much as the longest one (tokens) and as the one with most pictures (tiles), so both are spread
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
    """Fill rows up to data.sequence_length with several samples; training.global_batch_size then counts rows."""
    window_samples: int = 1024
    """Samples of the order that are packed among each other; more fill rows better and mix less locally."""


def pack_window(sizes: SampleSizes, row_length: int, seed: Sequence[int] = (0,)) -> list[list[int]]:
    """Rows of samples, by their places in `sizes`; each place stands in exactly one row.

    No row is longer than `row_length`; there are about as few rows as best fit decreasing finds. Samples of 0 rows (known
    to be bad) are dealt out, so that reading them counts them.

    Args:
        seed: of the order of the rows, which would otherwise run from long to short samples.
    """
    real = np.flatnonzero(sizes.rows > 0)
    by_length = sorted(real.tolist(), key=lambda place: (-sizes.rows[place], -sizes.tiles[place], place))
    tight = _best_fit(sizes, by_length, row_length)
    fewest = -(-int(sizes.rows.sum()) // row_length)
    rows = None
    spare = len(tight) // 50  # two in a hundred rows more are worth an even load
    for count in sorted({fewest, len(tight), len(tight) + min(1, spare), len(tight) + spare}):
        rows = rows or _spread(sizes, by_length, row_length, count)
    rows = rows or tight or [[]]
    for turn, place in enumerate(np.flatnonzero(sizes.rows <= 0).tolist()):
        rows[turn % len(rows)].append(place)
    return [sorted(rows[number]) for number in all_shuffled(len(rows), round_keys(*seed))]


def _best_fit(sizes: SampleSizes, by_length: Sequence[int], row_length: int) -> list[list[int]]:
    """Best fit decreasing: each sample into the fullest row that holds it."""
    free = np.full(len(by_length), row_length, dtype=np.int64)
    rows: list[list[int]] = []
    for place in by_length:
        length = sizes.rows[place]
        open_rows = free[: len(rows)]
        left = np.where(open_rows >= length, open_rows, row_length + 1)
        best = int(left.argmin()) if len(rows) else 0
        if not rows or left[best] > row_length:
            best = len(rows)
            rows.append([])
        rows[best].append(place)
        free[best] -= length
    return rows


def _spread(sizes: SampleSizes, by_length: Sequence[int], row_length: int, count: int) -> list[list[int]] | None:
    """`count` rows, each sample into the one that stays least loaded in tokens and tiles; None if one does not fit."""
    if count == 0:
        return None
    mean_tokens = max(sizes.rows.sum() / count, 1)
    mean_tiles = max(sizes.tiles.sum() / count, 1)
    tokens, tiles = np.zeros(count), np.zeros(count)
    rows: list[list[int]] = [[] for _ in range(count)]
    for place in by_length:
        new_tokens = tokens + sizes.rows[place]
        load = np.maximum(new_tokens / mean_tokens, (tiles + sizes.tiles[place]) / mean_tiles)
        load += 1e-3 * (new_tokens / mean_tokens)  # of equals in the worse of the two, the shorter row
        load[new_tokens > row_length] = np.inf
        best = int(load.argmin())
        if load[best] == np.inf:
            return None
        rows[best].append(place)
        tokens[best] += sizes.rows[place]
        tiles[best] += sizes.tiles[place]
    return rows
