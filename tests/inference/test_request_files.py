"""Questions in files: however a line names its pictures, they are asked with it, or the line is refused."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.request_files import AnswerFile, Request, load_request, read_requests

RED, BLUE = b"red picture", b"blue picture"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "blue.png").write_bytes(BLUE)
    return tmp_path


def read(folder: Path, line: dict[str, Any] | bytes) -> Request:
    path = folder / "in.jsonl"
    path.write_bytes(line if isinstance(line, bytes) else json.dumps(line).encode())
    (request,) = read_requests(path)
    return request


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


ONE_PICTURE: dict[str, dict[str, Any]] = {
    "images": {"question": "What?", "images": ["red.png"]},
    "image": {"question": "What?", "image": "red.png"},
    "a list in image": {"question": "What?", "image": ["red.png"]},
    "beside null columns": {"question": "What?", "image": "red.png", "images": None, "conversation": None, "id": None},
    "a null first": {"question": "What?", "image": None, "images": ["red.png"]},
    "file_name": {"question": "What?", "file_name": "red.png"},
    "a tag": {"question": "<img>red.png</img>What?"},
    "a description": {"question": "What?", "images": [{"path": "red.png", "bytes": None}]},
    "data": {"question": "What?", "image": "data:image/png;base64," + base64.b64encode(RED).decode()},
    "ms-swift's": {"query": "<image>What?", "response": "not given", "images": ["red.png"]},
    "Alpaca's": {"instruction": "What?", "output": "not given", "image": "red.png"},
    "turns": {"conversation": [{"from": "human", "value": "<image>\nWhat?"}], "images": ["red.png"]},
    "turns without a place": {"conversations": user("What?"), "images": ["red.png"]},
    "a tag in capitals": {"question": "<IMG>\nred.png\n</IMG>What?"},
    "a turn's own": {"conversation": [{"from": "human", "value": "What?", "image": "red.png"}]},
    "parts": {"messages": user([{"type": "image", "image": "red.png"}, {"type": "text", "text": "What?"}])},
    "parts with an address": {
        "messages": user([{"type": "image_url", "image_url": {"url": "red.png"}}, {"type": "text", "text": "What?"}])
    },
}


@pytest.mark.parametrize("name", ONE_PICTURE)
def test_a_picture_is_asked_about_however_it_is_named(folder: Path, name: str) -> None:
    request = read(folder, ONE_PICTURE[name])
    raw = load_request(request, folder)
    assert list(raw.pictures.values()) == [RED]
    (turn,) = raw.record["conversation"]
    assert turn["value"].count("<image>") == 1 and turn["value"].endswith("What?")


def test_pictures_stand_in_order_and_a_system_turn_in_front(folder: Path) -> None:
    line = {"system": "Be brief.", "messages": user("<img>blue.png</img> or <img>red.png</img>?"), "id": 7}
    raw = load_request(read(folder, line), folder)
    assert list(raw.pictures.values()) == [BLUE, RED] and raw.key == "7"
    said = [(turn["from"], turn["value"]) for turn in raw.record["conversation"]]
    assert said == [("system", "Be brief."), ("human", "<image> or <image>?")]


def test_text_alone_stays_text(folder: Path) -> None:
    raw = load_request(read(folder, {"question": "What is 2?", "images": []}), folder)
    assert raw.pictures == {} and raw.record["conversation"] == [{"from": "human", "value": "What is 2?"}]


REFUSED: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "another field": ({"question": "What?", "picture": "red.png"}, "its 'picture' names the picture 'red.png'"),
    "a nested field": (
        {"question": "What?", "meta": {"image": "red.png"}},
        "its 'meta.image' names the picture 'red.png'",
    ),
    "the system": ({"question": "What?", "system": "<img>red.png</img>"}, "its 'system' names the picture 'red.png'"),
    "two fields": (
        {"question": "?", "image": "red.png", "images": ["blue.png"]},
        "its 'images' names 'blue.png'; leave",
    ),
    "an answer's part": (
        {"messages": [*user("What?"), {"role": "assistant", "content": [{"type": "image", "image": "red.png"}]}]},
        "turn 1 of its conversation, of the assistant, names the picture 'red.png' outside a user's turn",
    ),
    "base64": (
        {"question": "What?", "image": "QUJD" * 500},
        f"the image {'QUJD' * 10!r}... (2000 characters), which is no",
    ),
    "an address": ({"question": "What?", "image": "https://a.org/red.png"}, "is an address; download it"),
    "data": ({"question": "What?", "image": "data:image/png;base64,A!"}, "is no base64"),
    "two places": ({"question": "<image> <image>?", "image": "red.png"}, "has 2 <image> and it has 1 images"),
    "a place without a picture": ({"question": "<image>?"}, "has 1 <image> and it has 0 images"),
    "half a character": (b'{"question": "\\ud800?"}', "half of a character"),
    "another encoding": ('{"question": "你"}'.encode("gbk"), "is not UTF-8"),
    "a part of another kind": ({"messages": user([{"type": "video"}])}, "a part of type 'video'"),
    "a nested image": ({"question": "What?", "meta": {"image": "red.png"}}, "its 'meta.image' names the picture"),
    "a system turn": ({"question": "What?", "system": "<IMG>red.png</IMG>"}, "its 'system' names the picture"),
    "image and images": ({"question": "What?", "image": "red.png", "images": ["blue.png"]}, "names 'red.png' and its"),
    "an answer's place": (
        {"messages": [*user("What?"), {"role": "assistant", "content": [{"type": "image"}]}, *user("And?")]},
        "names a picture outside a user's turn",
    ),
    "both": ({"question": "What?", "messages": user("What?")}, "it needs one of 'conversations' or 'texts'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_asked_is_one_sentence(folder: Path, name: str) -> None:
    line, words = REFUSED[name]
    with pytest.raises(UserError) as caught:
        load_request(read(folder, line), folder)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_picture_without_an_end_is_not_read(folder: Path, kind: str) -> None:
    path = folder / "endless.png"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="endless.png is no file"):
        load_request(read(folder, {"question": "What?", "image": "endless.png"}), folder)


def test_answers_are_written_beside_the_question(folder: Path) -> None:
    request = read(folder, {"id": None, "question": "What?", "note": "kept", "image": "red.png"})
    AnswerFile(folder / "out.jsonl").write([(request, {"answer": "Red."}, "")])
    (line,) = (folder / "out.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "id": "line 1",
        "question": "What?",
        "note": "kept",
        "image": "red.png",
        "answer": "Red.",
    }
    assert AnswerFile(folder / "out.jsonl").done == {"line 1"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'"id and answer"', "its JSON is no object"),
        (b'["id", "answer"]', "its JSON is no object"),
        (b"7", "its JSON is no object"),
        (b'{"id": [1], "answer": "Red."}', "its 'id' is neither text nor a number"),
        (b'{"answer": "Red."}', "its 'id' is neither text nor a number"),
        (b'{"id": 1, "answer": ["Red."]}', "neither an 'answer' nor an 'error' of text"),
        (b'{"id": 1, "answer": "R\xff"}', "is not UTF-8"),
        (b"[" * 100_000, "its JSON is broken"),
        (b"\xff\xfe", "its JSON is broken"),
    ],
)
def test_a_file_that_holds_no_answers_is_one_sentence(folder: Path, line: bytes, says: str) -> None:
    path = folder / "out.jsonl"
    path.write_bytes(b'{"id": 3, "answer": "Red."}\n' + line + b"\n")
    with pytest.raises(UserError, match="name another file with --outputs") as caught:
        AnswerFile(path)
    assert f"line 2 of {path} is no answer: " in str(caught.value) and says in str(caught.value)
    assert path.read_bytes().endswith(line + b"\n")


def test_a_pipe_is_neither_questions_nor_answers(tmp_path: Path) -> None:
    """It would be waited for."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe is no file; correct --inputs"):
        read_requests(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe is a pipe and no file"):
        AnswerFile(tmp_path / "pipe")
