"""An epoch is the first places of the order in which the set that lasts longest is read once."""

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nvlm.data.order.batches import DataPosition, PackedBatchPlan, UnpackedBatchPlan
from megatron_nvlm.data.order.blend import Blend
from megatron_nvlm.data.order.lengths import SampleSizes
from megatron_nvlm.data.order.order import BlendedOrder
from megatron_nvlm.data.order.packing import PackingConfig

SETS = st.lists(
    st.tuples(st.integers(1, 40), st.one_of(st.integers(0, 6), st.sampled_from([0.1, 0.35, 1.5]))),
    min_size=1,
    max_size=5,
).filter(lambda sets: any(weight for _, weight in sets))


def walked_epoch(sets: list[tuple[int, float]], order: BlendedOrder) -> int:
    """The definition, read off the order itself."""
    lasts = [Fraction(size) / Fraction(str(weight)) if weight else Fraction(0) for size, weight in sets]
    missing = {
        (number, one) for number, last in enumerate(lasts) if last == max(lasts) for one in range(sets[number][0])
    }
    places = 0
    while missing:
        sample = order(places)
        missing.discard((sample.dataset, sample.number))
        places += 1
    return places


@settings(max_examples=150, deadline=None)
@given(SETS, st.integers(0, 5))
def test_an_epoch_reads_the_longest_set_once(sets: list[tuple[int, float]], seed: int) -> None:
    order = BlendedOrder([size for size, _ in sets], [weight for _, weight in sets], seed)
    assert order.places_of_epoch() == walked_epoch(sets, order)


@pytest.mark.parametrize("longest_period", [1 << 18, 64], ids=["one block", "many blocks"])
def test_places_of_samples_invert_the_blend(longest_period: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_nvlm.data.order.blend.SHORTEST_BLOCK", 64)
    blend = Blend([0.311, 0.107, 0.582], longest_period)
    for place in range(3000):
        assert blend.place_of(*blend(place)) == place


class Sizes:
    """In the place of a LengthCounter: lengths that are a function of the sample's number."""

    sequence_length = 64

    def sizes(self, index: Any, numbers: list[int]) -> SampleSizes:
        tokens = np.array([(number * 37) % 64 + 1 for number in numbers], dtype=np.int64)
        return SampleSizes(tokens, tokens % 5)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 90), st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_steps_are_the_fewest_that_hold_all_places(places: int, batch: int, window: int, packs: bool) -> None:
    plan: Any = UnpackedBatchPlan(1, batch)
    if packs:
        order = BlendedOrder([23], [1.0], 1)
        plan = PackedBatchPlan(PackingConfig(True, window), order, [SimpleNamespace()], Sizes(), batch)  # type: ignore[arg-type,list-item]
    missing, position, steps = set(range(places)), DataPosition(), 0
    while missing:
        step = plan.step(position)
        missing -= {place for pack in step.micro_batches for place in pack}
        position, steps = step.after, steps + 1
    assert plan.num_steps(places) == steps
