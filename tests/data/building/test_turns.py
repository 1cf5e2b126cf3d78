"""What is learned of a line and what is not: places of images, system turns, turns that are given, empty answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_nvlm.data.building.lint import Check, lint
from megatron_nvlm.data.order.lengths import TextTokenCounter
from megatron_nvlm.data.prepare import BadSample, SamplePipeline
from megatron_nvlm.data.shards.records import RawSample
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.conversation import TextPiece, Turn, encode_conversation, find_template
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.data.building.builds import build, build_lines, colours_of, turns_of
from tests.support.shards import picture, record, write_samples

Line = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(qwen2_tokenizer(1024))


def human(text: str) -> Line:
    return {"from": "human", "value": text}


def gpt(text: str, **more: Any) -> Line:
    return {"from": "gpt", "value": text, **more}


def learned_text(sample: RawSample, tokenizer: Tokenizer) -> str:
    """What training learns of a sample, specials by their names."""
    tiling = TilingConfig(tile_size=56)
    pipeline = SamplePipeline(tokenizer, tiling, VARIANTS["d"], 4, 512, "chatml_end_only", None)
    sequence = pipeline.prepare(sample).sequence
    targets = sequence.labels[sequence.loss_mask > 0]
    return "".join(tokenizer.token_text(int(token)) for token in targets)


@pytest.mark.parametrize(
    "line",
    [
        {"image": "red.png", "conversations": [human("Which tag?"), gpt("It shows the <image> tag.")]},
        {"image": "red.png", "conversations": [human("<image>Which?"), gpt("It shows the <image> tag.")]},
        {"conversations": [human("Tags of SVG?"), gpt("<svg>, <image>")]},
        {"image": "red.png", "caption": "The word <image> on a card"},
        {"image": "red.png", "question": "Which tag?", "answer": "<image>"},
        {"text": "The tag <image>."},
        {"image": "red.png", "system": "Use <image>.", "conversations": [human("What?"), gpt("Red.")]},
    ],
)
def test_a_place_of_an_image_outside_a_users_turn_is_a_named_reject(tmp_path: Path, line: Line) -> None:
    samples, rejects = build_lines(tmp_path, line)
    assert samples == [] and len(rejects) == 1
    assert "says <image>, which is the place of an image and stands in a user's turn alone" in rejects[0]


def test_a_set_of_before_with_a_place_in_an_answer_is_a_bad_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Such sets were built; neither training nor the count takes the answer's word for a picture, and lint says so."""
    content = {"conversation": [human("Draw."), gpt("Here: <image>")], "images": [{}], "source": "test"}
    sample = RawSample("old", content, {"0.png": picture(9, 9)})
    with pytest.raises(BadSample, match=r"turn 1 of its conversation, of the assistant, says <image>") as caught:
        learned_text(sample, tokenizer)
    assert caught.value.kind == "conversation"
    with pytest.raises(UserError, match="says <image>"):
        TextTokenCounter(tokenizer, "chatml", None)(content)
    folder = write_samples(tmp_path / "set", [(content, sample.pictures), (record("?", "2"), {"0.png": picture(9, 9)})])
    faults = lint(folder, Check()).faults
    assert {(fault.kind, "sample_0000" in fault.place) for fault in faults} == {
        ("conversation", True),
        ("placeholders", True),
    }


def test_what_a_model_has_said_is_text(tokenizer: Tokenizer) -> None:
    """In a conversation that goes on, an answer may say anything."""
    turns = [Turn("user", "<image>?"), Turn("assistant", "An <image> tag."), Turn("user", "Why?")]
    pieces = encode_conversation(turns, 1, tokenizer, find_template("chatml"), open_answer=True)
    text = tokenizer.decode([token for piece in pieces if isinstance(piece, TextPiece) for token in piece.ids])
    assert len(pieces) - sum(isinstance(piece, TextPiece) for piece in pieces) == 1
    assert "An <image> tag." in text


def test_a_system_field_is_the_system_turn(tmp_path: Path) -> None:
    talk = [human("What?"), gpt("Red.")]
    lines: list[Line] = [
        {"system": "Answer in French.", "conversations": talk},
        {"system": "Be brief.", "image": "red.png", "question": "What?", "answer": "Red."},
        {"system": None, "conversations": talk},
        {"system": "  ", "conversations": talk},
        {"system": "S", "conversations": [{"from": "system", "value": "S"}, *talk]},
        {"system": "S", "conversations": [{"from": "system", "value": "T"}, *talk]},
        {"system": 7, "conversations": talk},
    ]
    samples, rejects = build_lines(tmp_path, *lines)
    said = [("human", "What?"), ("gpt", "Red.")]
    assert [turns_of(sample) for sample in samples] == [
        [("system", "Answer in French."), *said],
        [("system", "Be brief."), ("human", "<image>\nWhat?"), ("gpt", "Red.")],
        said,
        said,
        [("system", "S"), *said],
    ]
    assert rejects == [
        "its 'system' and its conversation's system turn differ; leave one out",
        "its 'system' is no text",
    ]


@pytest.mark.parametrize("given", [{"loss": False}, {"weight": 0}, {"train": False}, {"loss": None, "weight": 0.0}])
def test_a_turn_that_is_given_is_not_learned(tmp_path: Path, tokenizer: Tokenizer, given: Line) -> None:
    talk = [human("One?"), gpt("bad", **given), human("Two?"), gpt("good", loss=True, weight=1)]
    plain = [human("One?"), gpt("bad"), human("Two?"), gpt("good")]
    samples, rejects = build_lines(tmp_path, {"conversations": talk}, {"conversations": plain})
    assert rejects == []
    assert samples[0].record["conversation"] == [human("One?"), gpt("bad", loss=False), human("Two?"), gpt("good")]
    assert samples[1].record["conversation"] == plain
    assert [learned_text(sample, tokenizer) for sample in samples] == ["good<|im_end|>", "bad<|im_end|>good<|im_end|>"]
    # The tokens are the same, only the mask differs; and the flag passes through another build.
    pipeline = SamplePipeline(tokenizer, TilingConfig(tile_size=56), VARIANTS["d"], 4, 512, "chatml", None)
    np.testing.assert_array_equal(*[pipeline.prepare(sample).sequence.tokens for sample in samples])
    again, _ = build(tmp_path / "again", "--webdataset", tmp_path / "set")
    assert [one.record["conversation"] for one in again] == [one.record["conversation"] for one in samples]


def test_a_weight_between_is_refused(tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]}
    assert build_lines(tmp_path, line)[1] == [
        "turn 1 of its conversation has 'weight' 0.5; it must be true, false, 1 or 0"
    ]


def test_an_empty_answer_is_a_named_reject(tmp_path: Path) -> None:
    end = [human("Two?"), gpt("b")]
    samples, rejects = build_lines(
        tmp_path,
        {"conversations": [human("One?"), gpt(""), *end]},
        {"conversations": [*end, human("One?"), gpt(" \n")]},
        {"conversations": [human("One?"), gpt("", loss=False), *end]},
        {"conversations": [human("One?"), gpt("a", loss=False)]},
        {"conversations": [human("One?"), gpt("")]},
    )
    assert [len(turns_of(sample)) for sample in samples] == [4]
    nothing = "it has no answer, so there is nothing to learn"
    assert [reason[:45] for reason in rejects[:2]] == [
        "turn 1 of its conversation is an empty answer",
        "turn 3 of its conversation is an empty answer",
    ]
    assert rejects[2:] == [nothing, nothing]


def test_parts_of_a_message_are_joined_without_a_newline(tmp_path: Path, tokenizer: Tokenizer) -> None:
    said = [{"type": "text", "text": "The answer "}, {"type": "text", "text": "is 4", "image": None}]
    asked = [{"type": "text", "text": "In "}, {"type": "image", "text": None}, {"type": "text", "text": ", what?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    (sample,), _ = build_lines(tmp_path, {"images": ["red.png"], "messages": messages})
    assert turns_of(sample) == [("human", "In <image>, what?"), ("gpt", "The answer is 4")]
    assert learned_text(sample, tokenizer) == "The answer is 4<|im_end|>"


def test_what_is_null_is_absent(tmp_path: Path) -> None:
    """Tables write every column into every line."""
    talk = [human("What?"), gpt("Red.")]
    nulls = {"from": None, "value": None}
    lines: list[Line] = [
        {"image": None, "images": ["red.png"], "conversations": talk},
        {"image": "", "images": ["green.png"], "conversations": talk},
        {"question": None, "answer": None, "caption": "Red", "image": "red.png", "conversations": None},
        {"conversations": None, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {
            "messages": [
                {"role": "user", "content": "q", **nulls},
                {"role": "assistant", "content": "a", **nulls, "loss": None},
            ]
        },
        {"image": None, "images": None, "conversations": talk},
    ]
    samples, rejects = build_lines(tmp_path, *lines)
    assert rejects == []
    assert [colours_of(sample) for sample in samples] == [["red"], ["green"], ["red"], [], [], []]
    assert [turns_of(sample)[0][1] for sample in samples] == [
        "<image>\nWhat?",
        "<image>\nWhat?",
        "<image>\nDescribe the image briefly.",
        "q",
        "q",
        "What?",
    ]
