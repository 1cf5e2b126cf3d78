"""Who encodes which tiles."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.ops.gather_tiles import share_of


@given(st.integers(0, 500), st.integers(1, 64))
def test_shares_hold_each_tile_once_and_differ_by_one_at_most(num_tiles: int, ranks: int) -> None:
    shares = [share_of(num_tiles, ranks, rank) for rank in range(ranks)]
    assert [tile for start, end in shares for tile in range(start, end)] == list(range(num_tiles))
    sizes = [end - start for start, end in shares]
    assert max(sizes) - min(sizes) <= 1
