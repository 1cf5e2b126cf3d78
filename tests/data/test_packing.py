"""Packing: every sample in one row, no row too long, both loads even, nothing but the sizes decides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nvlm.data.order.lengths import SampleSizes
from megatron_nvlm.data.order.packing import pack_window

LENGTH = 512
SIZES = st.lists(st.tuples(st.integers(0, LENGTH), st.integers(0, 13)), min_size=0, max_size=120)


def sizes_of(pairs: list[tuple[int, int]]) -> SampleSizes:
    return SampleSizes(
        np.array([rows for rows, _ in pairs], dtype=np.int64), np.array([tiles for _, tiles in pairs], dtype=np.int64)
    )


@settings(max_examples=150, deadline=None)
@given(SIZES)
def test_every_sample_stands_in_one_row_and_no_row_is_too_long(pairs: list[tuple[int, int]]) -> None:
    sizes = sizes_of(pairs)
    rows = pack_window(sizes, LENGTH)
    assert sorted(place for row in rows for place in row) == list(range(len(pairs)))
    assert all(sizes.tokens[row].sum() <= LENGTH for row in rows)
    assert rows == pack_window(sizes, LENGTH)
    total = int(sizes.tokens.sum())
    # Best fit decreasing needs at most 11/9 of the fewest rows and two thirds of a row more.
    assert len(rows) <= max(1, -(-total // LENGTH) * 2)


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_full_and_even(seed: int) -> None:
    """Of a mixture such as SFT has: short text, single images of few tiles, long documents of many."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, 600)
    rows = np.choose(kind, [rng.integers(20, 400, 600), rng.integers(300, 900, 600), rng.integers(800, 3000, 600)])
    tiles = np.choose(kind, [np.zeros(600, dtype=int), rng.integers(1, 8, 600), rng.integers(5, 14, 600)])
    sizes = SampleSizes(rows.astype(np.int64), tiles.astype(np.int64))
    packed = pack_window(sizes, 4096)
    tokens = np.array([rows[row].sum() for row in packed])
    pictures = np.array([tiles[row].sum() for row in packed])
    assert tokens.mean() / 4096 > 0.95
    assert tokens.std() / tokens.mean() < 0.05
    in_order = np.array_split(np.arange(600), len(packed))
    assert pictures.std() < 0.4 * np.std([tiles[part].sum() for part in in_order])
