"""The order of samples: a bijection in every epoch, shares kept at every point, nothing but seed, blend and i."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nvlm.data.order import BlendedOrder, shuffled
from megatron_nvlm.errors import UserError


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4))
def test_shuffle_is_a_bijection(size: int, keys: list[int]) -> None:
    assert sorted(shuffled(position, size, keys) for position in range(size)) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 12)), min_size=1, max_size=5).filter(
        lambda sets: any(weight for _, weight in sets)
    ),
    st.integers(0, 5),
)
def test_every_set_stays_within_one_of_its_share(sets: list[tuple[int, int]], seed: int) -> None:
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    order = BlendedOrder(sizes, weights, seed)
    taken: Counter[int] = Counter()
    for i in range(200):
        taken[order(i).dataset] += 1
        for number, weight in enumerate(weights):
            assert abs(taken[number] - (i + 1) * weight / sum(weights)) <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_each_epoch_shows_each_sample_once(first: int, second: int, seed: int) -> None:
    order = BlendedOrder([first, second], [2, 1], seed)
    seen: Counter[tuple[int, int, int]] = Counter()
    for i in range(6 * max(first, second)):
        sample = order(i)
        seen[sample.dataset, sample.epoch, sample.number] += 1
    assert set(seen.values()) == {1}


def test_epochs_and_seeds_differ() -> None:
    def numbers(seed: int, epoch: int) -> list[int]:
        order = BlendedOrder([64], [1], seed)
        return [order(i).number for i in range(64 * epoch, 64 * (epoch + 1))]

    assert len({tuple(numbers(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    assert numbers(0, 1) == numbers(0, 1)


def test_no_weight_is_refused() -> None:
    with pytest.raises(UserError, match="needs a weight"):
        BlendedOrder([3, 4], [0, 0], 1)
