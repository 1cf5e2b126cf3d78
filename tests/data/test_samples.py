"""One stored sample to rows: what is bad is said by kind, and sizes from 1x1 to 20000x300 go through."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_nvlm.data.prepare import BadSample, SamplePipeline
from megatron_nvlm.data.shards.read import RawSample
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.sequence.assemble import IGNORED_LABEL
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.shards import picture, record


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(qwen2_tokenizer(1024))


def make_pipeline(tokenizer: Tokenizer, variant: str = "h", sequence_length: int = 256) -> SamplePipeline:
    return SamplePipeline(
        tokenizer, TilingConfig(tile_size=56, max_tiles=6), VARIANTS[variant], 4, sequence_length, "chatml", None
    )


def raw(content: dict[str, Any], pictures: dict[str, bytes]) -> RawSample:
    return RawSample("sample", content, pictures)


@pytest.mark.parametrize(
    ("sample", "kind", "says"),
    [
        (raw({"images": []}, {}), "conversation", "its JSON has no conversation"),
        (raw({"conversation": "hello"}, {}), "conversation", "its JSON has no conversation"),
        (
            raw({"conversation": [{"from": "cat", "value": "x"}]}, {}),
            "conversation",
            "turn 0 of its conversation needs",
        ),
        (
            raw(record("Two?", "2", images=0) | {"images": [{}]}, {"0.png": picture(9, 9)}),
            "conversation",
            "0 <image> for",
        ),
        (raw(record("<image>?", "2"), {"0.png": picture(9, 9)}), "conversation", "has 2 <image> for 1 images"),
        (raw(record("?", "2"), {}), "record", "names 1 images and its pictures belong to 0"),
        (raw(record("?", "2"), {"0.jpg": picture(90, 90, "JPEG")[:600]}), "image", "the image cannot be decoded"),
        (raw(record("?", "2"), {"0.jpg": b"no picture"}), "image", "the image cannot be decoded"),
        (raw(record("word " * 400, "2"), {"0.png": picture(9, 9)}), "too_long", "over data.sequence_length of 256"),
        (raw(record("?", "2"), {"0.tile_1.jpg": picture(56, 56, "JPEG")}), "image", "needs 'grid'"),
        (
            raw(record("?", "2") | {"images": [{"grid": [2, 1]}]}, {"0.tile_1.jpg": picture(56, 56, "JPEG")}),
            "image",
            "0.tile_2.jpg is missing",
        ),
        (
            raw(record("?", "2") | {"images": [{"grid": [1, 1]}]}, {"0.thumbnail.jpg": picture(40, 56, "JPEG")}),
            "image",
            "has 40x56 pixels and tiling.tile_size is 56",
        ),
    ],
)
def test_a_bad_sample_says_what_is_wrong(tokenizer: Tokenizer, sample: RawSample, kind: str, says: str) -> None:
    with pytest.raises(BadSample, match=says) as caught:
        make_pipeline(tokenizer).prepare(sample)
    assert caught.value.kind == kind


@pytest.mark.parametrize("variant", ["d", "x", "h"])
@pytest.mark.parametrize(("size", "pictures"), [((1, 1), 1), ((20000, 300), 7), ((56, 56), 1), ((300, 20000), 7)])
def test_any_size_goes_through(tokenizer: Tokenizer, variant: str, size: tuple[int, int], pictures: int) -> None:
    prepared = make_pipeline(tokenizer, variant).prepare(raw(record("?", "yes"), {"0.png": picture(*size)}))
    assert prepared.tiles.shape == (pictures, 3, 56, 56)
    assert prepared.sequence.num_tiles == pictures


def test_a_long_sample_gives_up_tiles_before_it_is_refused(tokenizer: Tokenizer) -> None:
    sample = raw(record("?", "yes"), {"0.png": picture(600, 100)})
    assert len(make_pipeline(tokenizer, "d", 256).prepare(sample).tiles) == 7
    full = len(make_pipeline(tokenizer, "d", 256).prepare(sample).sequence.tokens)
    assert len(make_pipeline(tokenizer, "d", full - 1).prepare(sample).tiles) < 7


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_the_end_of_a_text_is_left_out_where_the_run_allows_it(tokenizer: Tokenizer, variant: str) -> None:
    """What is kept is exactly the beginning, and the last token kept learns nothing that was left out."""
    sample = raw(record("?", "word " * 400), {"0.png": picture(168, 112)})
    whole = make_pipeline(tokenizer, variant, 1000).prepare(sample)
    fewest = make_pipeline(tokenizer, variant, 1000)
    fewest = replace(fewest, tiling=replace(fewest.tiling, max_tiles=1)).prepare(sample)
    assert whole.adjustment == ""
    fitting = replace(make_pipeline(tokenizer, variant, len(fewest.sequence.tokens)), too_long="truncate")
    assert fitting.prepare(sample).adjustment == ("" if variant == "h" else "fewer_tiles")  # tiles go first
    short = replace(make_pipeline(tokenizer, variant, 120), too_long="truncate").prepare(sample)
    rows, all_rows = short.sequence, fewest.sequence
    assert short.adjustment == "truncated" and len(rows.tokens) == 120
    np.testing.assert_array_equal(rows.tokens, all_rows.tokens[:120])
    np.testing.assert_array_equal(rows.context_intervals, all_rows.context_intervals[:120])
    np.testing.assert_array_equal(rows.labels[:-1], all_rows.labels[:119])
    assert rows.labels[-1] == IGNORED_LABEL and rows.loss_mask[-1] == 0 and rows.loss_mask.sum() > 20
    np.testing.assert_array_equal(short.tiles, fewest.tiles)


def test_what_truncation_cannot_mend_stays_a_bad_sample(tokenizer: Tokenizer) -> None:
    """A question so long that no answer is left, and images so many that one would be cut."""
    question = raw(record("word " * 400, "2", images=0), {})
    images = raw(record("?", "2", images=20), {f"{number}.png": picture(9, 9) for number in range(20)})
    for variant, sample in (("h", question), ("d", images), ("x", images)):
        pipeline = replace(make_pipeline(tokenizer, variant, 60), too_long="truncate")
        with pytest.raises(BadSample, match="over data.sequence_length of 60") as caught:
            pipeline.prepare(sample)
        assert caught.value.kind == "too_long"


def test_a_question_is_never_truncated(tokenizer: Tokenizer) -> None:
    pipeline = replace(make_pipeline(tokenizer, "h", 60), too_long="truncate")
    with pytest.raises(BadSample, match="over data.sequence_length"):
        pipeline.prepare(raw(record("word " * 100, "2", images=0), {}), open_answer=True)
