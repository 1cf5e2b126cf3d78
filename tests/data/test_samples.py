"""One stored sample to rows: what is bad is said by kind, and sizes from 1x1 to 20000x300 go through."""

from typing import Any

import pytest

from megatron_nvlm.data.prepare import BadSample, SamplePipeline
from megatron_nvlm.data.shards.read import RawSample
from megatron_nvlm.image.tiling import TilingConfig
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
