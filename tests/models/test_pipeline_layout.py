"""Layers by part of the pipeline."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.pipeline_layout import chunk_layers


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 5))
def test_equal_parts_hold_each_layer_once(stages: int, chunks: int, each: int) -> None:
    parts = chunk_layers(None, stages, chunks, stages * chunks * each)
    assert len(parts) == stages * chunks
    assert [layer for part in parts for layer in part] == list(range(stages * chunks * each))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_a_layout_string_says_how_many_layers_each_part_has(counts: list[int]) -> None:
    layout = "E" + "|".join(f"t*{count}" for count in counts) + "L"
    parts = chunk_layers(layout, len(counts), 1, sum(counts))
    assert [len(part) for part in parts] == counts
    assert [layer for part in parts for layer in part] == list(range(sum(counts)))


@pytest.mark.parametrize(
    "layout", ["Ett|tt", "tt|ttL", "EtE|ttL", "Et|tt|tL", "Et|t*4L", "E|t*4L", "Et|t)3L", "", "Em|t*4L"]
)
def test_what_cannot_be_is_refused_in_one_sentence(layout: str) -> None:
    with pytest.raises(UserError, match=r"^parallelism\.pipeline_layout [^\n]*$"):
        chunk_layers(layout, 2, 1, 4)
