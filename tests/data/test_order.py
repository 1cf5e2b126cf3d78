"""The order of samples: a bijection in every epoch, shares kept at every point, nothing but seed, blend and i."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nvlm.data.order import blend as blend_module
from megatron_nvlm.data.order.blend import Blend
from megatron_nvlm.data.order.order import BlendedOrder
from megatron_nvlm.data.order.shuffle import all_shuffled, shuffled
from megatron_nvlm.errors import UserError


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4))
def test_shuffle_is_a_bijection(size: int, keys: list[int]) -> None:
    numbers = [shuffled(position, size, keys) for position in range(size)]
    assert sorted(numbers) == list(range(size))
    assert all_shuffled(size, keys).tolist() == numbers


def deviations(blend: Blend, count: int) -> np.ndarray:
    """Largest distance of each set from its share, after each of the first `count` samples."""
    places = [blend(i) for i in range(count)]
    chosen = np.array([place[0] for place in places])
    before = np.array([place[1] for place in places])
    found = []
    for number, samples in enumerate(blend.counts):
        is_it = chosen == number
        assert (before[is_it] == np.arange(is_it.sum())).all()
        share = np.arange(1, count + 1) * (samples / blend.period)
        found.append(np.abs(np.cumsum(is_it) - share).max())
    return np.array(found)


WEIGHTS = st.lists(
    st.one_of(st.integers(0, 12), st.decimals(0, 1, places=5).map(float), st.sampled_from([1.0, 0.01, 1 / 3])),
    min_size=1,
    max_size=12,
).filter(lambda weights: sum(weights) > 0)


@settings(max_examples=80, deadline=None)
@given(WEIGHTS)
def test_every_set_stays_within_one_of_its_share(weights: list[float]) -> None:
    try:
        blend = Blend(weights)
    except UserError as error:
        assert "too small to blend exactly" in str(error)
        return
    assert (deviations(blend, 300) <= 1 + 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 40), st.sampled_from([1000, 999, 37])), min_size=2, max_size=14))
def test_blocks_of_a_long_period_keep_the_shares_too(weights: list[int]) -> None:
    """Blocks are made short here, so that many bounds are crossed."""
    before = blend_module.SHORTEST_BLOCK
    blend_module.SHORTEST_BLOCK = 64
    try:
        blend = Blend(weights, longest_period=1)
        assert (deviations(blend, 5 * blend.block) <= 1 + 1e-9).all()
        assert blend(3 * blend.block + 5) == Blend(weights, longest_period=1)(3 * blend.block + 5)
    finally:
        blend_module.SHORTEST_BLOCK = before


def test_a_small_weight_is_exact() -> None:
    """One in a hundred thousand is not rounded, neither in a short period nor beside a weight that makes it long."""
    for weights in ([1, 0.00001], [1, 0.00001, 0.123456789]):
        blend = Blend(weights)
        count = 400_000 if len(weights) == 2 else 2 * blend.block
        assert (deviations(blend, count) <= 1).all()
        assert sum(blend(i)[0] == 1 for i in range(count)) == pytest.approx(count * 0.00001 / sum(weights), abs=1)
    with pytest.raises(UserError, match="the weight 1e-12 is 1.0e-12 of all, too small"):
        Blend([1, 1e-12])


def test_a_far_place_needs_no_walk_there() -> None:
    blend = Blend([0.123456789, 0.3333333333, 0.00077])
    share = blend.counts[1] / blend.period
    for i in (10**8, 10**12 + 7, 10**15):
        chosen, before = blend(i)
        assert abs(before - i * blend.counts[chosen] / blend.period) <= 1 + 1e-3
    assert 0.7 < share < 0.74


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any), st.integers(1, 5), st.integers(0, 9))
def test_each_epoch_shows_each_sample_once(sizes: list[int], window_shards: int, seed: int) -> None:
    order = BlendedOrder([sizes, 7], [2, 1], seed, window_shards)
    total = sum(sizes)
    seen: Counter[tuple[int, int, int]] = Counter()
    for i in range(6 * max(total, 7)):
        sample = order(i)
        seen[sample.dataset, sample.epoch, sample.number] += 1
    assert set(seen.values()) == {1}
    first_epoch = {number for dataset, epoch, number in seen if (dataset, epoch) == (0, 0)}
    assert first_epoch == set(range(total))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=40), st.integers(1, 4), st.integers(0, 9))
def test_few_shards_are_read_at_a_time(sizes: list[int], window_shards: int, seed: int) -> None:
    """Shards in the order of their last use: once left, a window's shards do not come back in that epoch."""
    order = BlendedOrder([sizes], [1], seed, window_shards)
    ends = np.cumsum(sizes)
    shards = [int(np.searchsorted(ends, order(i).number, side="right")) for i in range(sum(sizes))]
    open_shards: set[int] = set()
    closed: set[int] = set()
    left = Counter(dict(enumerate(sizes)))
    for shard in shards:
        assert shard not in closed
        open_shards.add(shard)
        left[shard] -= 1
        if not left[shard]:
            open_shards.discard(shard)
            closed.add(shard)
        assert len(open_shards) <= window_shards


def test_epochs_and_seeds_differ() -> None:
    def numbers(seed: int, epoch: int) -> list[int]:
        order = BlendedOrder([[16] * 4], [1], seed, 2)
        return [order(i).number for i in range(64 * epoch, 64 * (epoch + 1))]

    assert len({tuple(numbers(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    assert numbers(0, 1) == numbers(0, 1)


def test_no_weight_is_refused() -> None:
    for weights in ([0, 0], [1], [2, -1]):
        with pytest.raises(UserError, match="needs a weight"):
            BlendedOrder([3, 4], weights, 1)
