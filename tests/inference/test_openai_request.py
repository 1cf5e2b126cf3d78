"""Lines of OpenAI's batch form: read with their settings, or refused by a sentence that names what cannot be done."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.openai_request import read_settings
from megatron_nvlm.inference.request_files import Request, read_requests
from megatron_nvlm.inference.sampling import Sampling

MESSAGES = [{"role": "user", "content": "What is 3?"}]


def read(folder: Path, line: dict[str, Any]) -> Request:
    (folder / "in.jsonl").write_text(json.dumps(line))
    (request,) = read_requests(folder / "in.jsonl")
    return request


def test_a_batch_line_is_read_with_its_settings(tmp_path: Path) -> None:
    body = {
        "model": "nvlm",
        "messages": MESSAGES,
        "temperature": 1,
        "top_p": 0.5,
        "max_tokens": 7,
        "stop": ["a", "b"],
        "seed": 4,
        "logprobs": True,
        "top_logprobs": 2,
        "n": 1,
        "stream": False,
        "user": None,
    }
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    request = read(tmp_path, line)
    assert not request.error and request.id == "one" and [turn["value"] for turn in request.turns] == ["What is 3?"]
    wanted = Sampling(1.0, 0.5, 4, 7, 11, stop=("a", "b"), logprobs=2)
    assert dataclasses.replace(Sampling(top_k=11), **request.settings) == wanted


def test_lines_without_a_body_set_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, {"messages": MESSAGES}).settings == {}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tools": [{}]}, "no parameter 'tools'"),
        ({"n": 2}, "n is 2, which is not possible"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5; it must be a whole number"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"stop": [1]}, "it must be a text or a list of texts"),
        ({"top_logprobs": 1}, "top_logprobs needs logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty is 0.5"),
        ({"messages": None}, "no 'messages'"),
    ],
)
def test_what_a_body_asks_in_vain_is_named(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    request = read(tmp_path, {"custom_id": "one", "body": {"messages": MESSAGES, **change}})
    assert sentence in request.error and request.id == "one"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"url": "/v1/embeddings"}, "only /v1/chat"), ({"question": "?"}, "'question'"), ({"body": []}, "no JSON object")],
)
def test_other_lines_with_a_body(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    assert sentence in read(tmp_path, {"custom_id": "one", "body": {"messages": MESSAGES}, **change}).error


def test_values_out_of_range_are_refused_with_the_answer() -> None:
    with pytest.raises(UserError, match="top_p is 2.0; it must be"):
        dataclasses.replace(Sampling(), **read_settings({"top_p": 2}))
