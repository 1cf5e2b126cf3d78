"""A line that names a picture anywhere has it, or is a reject that names the place; it never becomes text alone."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.building.builds import build_lines, build_tar, coloured, colours_of, turns_of

ANSWER = {"from": "gpt", "value": "Red."}
BASE64 = "iVBORw0KGgo" + "QUJD" * 500


def asked(text: Any, **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text, **more}, ANSWER]}


@pytest.mark.parametrize(
    ("line", "says", "colours"),
    [
        (asked("What?", image="red.png"), "<image>\nWhat?", ["red"]),
        (asked("What?", images=["red.png", "blue.png"]), "<image>\n<image>\nWhat?", ["red", "blue"]),
        (asked("Here <image>, what?", image="red.png"), "Here <image>, what?", ["red"]),
        (asked("What?", file_name="red.png"), "<image>\nWhat?", ["red"]),
        ({"image": "red.png", **asked("What?", image="./red.png")}, "<image>\nWhat?", ["red"]),
        (asked("<img>red.png</img>?", image="red.png"), "<image>?", ["red"]),
        (asked("<IMG>red.png</IMG>?"), "<image>?", ["red"]),
        (asked("<img>\n  red.png\n</img>\n?"), "<image>\n?", ["red"]),
        (asked([{"type": "text", "text": "<img>red.png</img>?"}]), "<image>?", ["red"]),
        ({"image": "red.png", "images": ["red.png"], "file_name": "./red.png", **asked("?")}, "<image>\n?", ["red"]),
    ],
)
def test_a_picture_is_used(tmp_path: Path, line: dict[str, Any], says: str, colours: list[str]) -> None:
    (sample,), rejects = build_lines(tmp_path, line)
    assert rejects == [] and turns_of(sample)[0] == ("human", says) and colours_of(sample) == colours


def test_the_picture_of_a_later_turn_stands_in_that_turn(tmp_path: Path) -> None:
    later = {"from": "human", "value": "And this?", "image": "blue.png"}
    (sample,), _ = build_lines(tmp_path, {"conversations": [*asked("Hello.")["conversations"], later, ANSWER]})
    assert [text for _, text in turns_of(sample)] == ["Hello.", "Red.", "<image>\nAnd this?", "Red."]
    assert colours_of(sample) == ["blue"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"meta": {"image": "red.png"}, **asked("?")},
        "its 'meta.image' names the picture 'red.png', and pictures are read",
    ),
    ({"meta": [{"a": {"b": ["red.png"]}}], "text": "A square"}, "its 'meta.a.b' names the picture 'red.png'"),
    ({"files": {"red.png": 1}, "text": "A square"}, "its 'files' names the picture 'red.png'"),
    (asked("?", meta={"image": "red.png"}), "its 'conversations.meta.image' names the picture 'red.png'"),
    (asked("?", img="red.png"), "its 'conversations.img' names the picture"),
    ({"meta": {"bytes": BASE64}, "text": "A square"}, "its 'meta.bytes' names the picture 'iVBORw0KGgoQUJDQ"),
    ({"text": "<img>red.png</img> A square"}, "its 'text' names the picture 'red.png'"),
    ({"text": "<IMG>red.png A square"}, "its 'text' names the picture 'red.png'"),
    (asked("<img>red.png What?"), "stands behind <img> without </img>"),
    ({"system": "<img>red.png</img>", **asked("?")}, "its 'system' names the picture 'red.png'"),
    ({"system": "<img>red.png</img>", "image": "blue.png", **asked("?")}, "its 'system' names the picture 'red.png'"),
    (
        {"conversations": [{"from": "system", "value": "<Img>red.png</Img>"}, *asked("?")["conversations"]]},
        "turn 0 of its conversation, of the system, names the picture 'red.png' outside a user's turn",
    ),
    (
        {"conversations": [*asked("?")["conversations"], {**ANSWER, "image": "red.png"}]},
        "of the assistant, names the pict",
    ),
    (
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": [{"type": "image"}]}]},
        "turn 1 of its conversation, of the assistant, names a picture outside a user's turn",
    ),
    (
        {"image": "red.png", "question": "?", "answer": "<img>blue.png</img>"},
        "turn 1 of its conversation, of the assistant, names the picture 'blue.png'",
    ),
    (asked("<image><image>?", image="red.png"), "turn 0 of its conversation has 2 <image> and names 1 pictures"),
    (asked("<img>red.png</img>", image="blue.png"), "names in its text other pictures ('red.png') than"),
    ({"image": "red.png", **asked("?", image="blue.png")}, "its turns name other pictures ('blue.png') than"),
    (
        {"image": "red.png", "images": ["blue.png"], "caption": "x"},
        "its 'image' names 'red.png' and its 'images' names",
    ),
    ({"image": "red.png", "file_name": "blue.png", "caption": "x"}, "its 'file_name' names 'blue.png'; leave one"),
    ({"images": ["red.png"], "image": ["red.png", "blue.png"], "caption": "x"}, "names 'red.png', 'blue.png' and its"),
    (asked([{"type": "text", "text": "?", "image": "red.png"}]), "a part of type 'text' in its conversation names a"),
    ({"image": BASE64, "caption": "x"}, f"its image {BASE64[:40]!r}... ({len(BASE64)} characters), which is no path"),
    ({"images": [{"path": BASE64}], "caption": "x"}, f"{BASE64[:40]!r}... ({len(BASE64)} characters)"),
]


def test_or_the_line_is_a_reject_that_names_it(tmp_path: Path) -> None:
    samples, rejects = build_lines(tmp_path, *(line for line, _ in REFUSED))
    assert samples == [] and len(rejects) == len(REFUSED)
    for reject, (_, says) in zip(rejects, REFUSED, strict=True):
        assert says in reject and "\n" not in reject and len(reject) < 500


def test_what_only_looks_like_a_picture_stays_text(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"text": "red.png"},
        {"id": "red.png", "text": "Words."},
        {"question": "Which file?", "answers": ["red.png"]},
        asked('What does <img src="red.png"> do? And <img> alone?'),
        {"meta": {"name": "words.txt"}, "text": "Words."},
    ]
    samples, rejects = build_lines(tmp_path, *lines)
    assert rejects == [] and [colours_of(sample) for sample in samples] == [[]] * len(lines)


def test_a_field_kept_in_a_set_is_no_second_name(tmp_path: Path) -> None:
    """The entries of our own sets describe pictures and name none."""
    told = '{"images": [{"width": 56}], "file_name": "a.jpg", "question": "?", "answer": "x"}'
    (sample,), rejects = build_tar(tmp_path, ("0.0.png", coloured("red")), ("0.json", told))
    assert rejects == [] and colours_of(sample) == ["red"]


CODE = base64.b64encode(coloured("green")).decode()
URL = f"data:image/png;base64,{CODE}"


@pytest.mark.parametrize(
    "line",
    [
        {"image": URL, **asked("?")},
        {"images": [{"bytes": CODE, "path": "nowhere.png"}], **asked("?")},  # datasets.Image of Hugging Face
        {"image": {"bytes": CODE, "path": None}, "images": [{"bytes": CODE}], **asked("?")},
        asked("?", image=URL),
        asked([{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "?"}]),  # OpenAI's
        asked([{"type": "input_image", "image_url": URL}, {"type": "text", "text": "?"}]),  # OpenAI's responses
        asked([{"type": "image", "path": "green.png"}, {"type": "text", "text": "?"}]),  # transformers'
        asked([{"type": "image", "image": {"bytes": CODE, "path": None}}, {"type": "text", "text": "?"}]),
        asked([{"type": "image", "image": "file://green.png"}, {"type": "text", "text": "?"}]),  # Qwen2-VL's
        asked([{"type": "image", "url": URL}, {"type": "text", "text": "?"}]),
    ],
)
def test_a_picture_within_the_line_is_used(tmp_path: Path, line: dict[str, Any]) -> None:
    (sample,), rejects = build_lines(tmp_path / "lines", line)
    assert rejects == [] and colours_of(sample) == ["green"] and turns_of(sample)[0][1].count("<image>") == 1
    members = [
        ("0.json", json.dumps(line)),
        *([("0.green.png", coloured("green"))] if "green.png" in str(line) else []),
    ]
    (sample,), rejects = build_tar(tmp_path / "tar", *members)
    assert rejects == [] and colours_of(sample) == ["green"]


def with_index(first: int, second: int) -> dict[str, Any]:
    """Two turns, each with a part that gives its picture's number."""
    parts = [[{"type": "image", "index": number}, {"type": "text", "text": "?"}] for number in (first, second)]
    answer = {"role": "assistant", "content": "x"}
    messages = [turn for part in parts for turn in ({"role": "user", "content": part}, answer)]
    return {"images": ["red.png", "blue.png"], "messages": messages}


def test_a_part_that_gives_its_pictures_number(tmp_path: Path) -> None:
    (sample,), rejects = build_lines(tmp_path / "right", with_index(0, 1))
    assert rejects == [] and colours_of(sample) == ["red", "blue"]
    samples, (reject,) = build_lines(tmp_path / "wrong", with_index(1, 0))
    assert samples == [] and "is picture 0 and has 'index' 1" in reject


def test_pictures_of_a_tar_and_of_its_json_keep_their_order(tmp_path: Path) -> None:
    told = json.dumps({"images": ["b.png", URL, "a.png"], **asked("?")})
    members = [("0.a.png", coloured("red")), ("0.b.png", coloured("blue")), ("0.json", told)]
    (sample,), rejects = build_tar(tmp_path, *members)
    assert rejects == [] and colours_of(sample) == ["blue", "green", "red"]


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("data:image/png,x", "is no data URL of base64"),
        ("data:image/png;base64,!" + "A" * 3000, "its image's data URL '!AAAA"),
        ({"bytes": "%"}, "its image's 'bytes' '%' is no base64"),
        ({"bytes": [1, 2]}, "is no base64"),
        ({"bytes": ""}, "its image's 'bytes' is empty"),
        ("https://a.org/b.png", "is an address; download it and name the file, for none is fetched"),
    ],
)
def test_what_is_no_picture_is_a_short_reject(tmp_path: Path, image: Any, says: str) -> None:
    samples, (reject,) = build_lines(tmp_path, {"image": image, **asked("?")})
    assert samples == [] and says in reject and len(reject) < 400


def test_a_reject_names_the_members_that_were_passed_over(tmp_path: Path) -> None:
    members = [("0.jpg", coloured("red", "JPEG")), ("0.context.txt", "What?"), ("0.answers.txt", "red")]
    samples, (reject,) = build_tar(tmp_path, *members)
    assert samples == [] and "it has id; members that are not read: context.txt, answers.txt" in reject
