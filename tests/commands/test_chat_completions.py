"""The chat page's server answers programs in OpenAI's form: requests, refusals, and a tiny model's real answers."""

import base64
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any, cast

import pytest

pytest.importorskip("flask", reason="Flask is not installed")

from megatron_nvlm.commands.chat_page import ModelThread, make_app
from megatron_nvlm.data.shards.records import RawSample
from megatron_nvlm.inference.decoding import GeneratedAnswer
from megatron_nvlm.inference.openai_chat import completion
from megatron_nvlm.inference.sampling import ChosenToken, Sampling
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.launch import environment, launch
from tests.support.shards import picture, write_run

PATH = "/v1/chat/completions"
IMAGE = picture(60, 50)
URL = "data:image/png;base64," + base64.b64encode(IMAGE).decode()
ASKED: dict[str, Any] = {
    "model": "any",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "What is this?"}],
        },
    ],
}


class Asked:
    """Stands for the model: keeps what it is asked."""

    name = "run/step"
    raw: RawSample
    sampling: Sampling

    def complete(self, raw: RawSample, sampling: Sampling) -> dict[str, Any]:
        self.raw, self.sampling = raw, sampling
        return {"id": "x"}


def post(model: Any, body: Any, path: str = PATH) -> Any:
    return make_app(cast(ModelThread, model)).test_client().post(path, json=body)


def test_a_request_reaches_the_model() -> None:
    model = Asked()
    body = {**ASKED, "temperature": 0.5, "max_tokens": 9, "seed": 3, "stop": "\n", "logprobs": True, "top_logprobs": 2}
    assert post(model, body).json == {"id": "x"}
    assert model.sampling == Sampling(0.5, seed=3, max_new_tokens=9, stop=("\n",), logprobs=2)
    assert model.raw.record["conversation"] == [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>What is this?"},
    ]
    assert list(model.raw.pictures.values()) == [IMAGE]


REFUSED: dict[str, tuple[Any, str]] = {
    "no object": ([1], "no JSON object"),
    "no messages": ({"model": "x"}, "has no 'messages'"),
    "nothing asked": ({"messages": [{"role": "assistant", "content": "Hi."}]}, "nothing to answer"),
    "a path": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/hostname"}}]}]},
        "no data URL",
    ),
    "a path as a tag": ({"messages": [{"role": "user", "content": "<img>/etc/hostname</img>What?"}]}, "no data URL"),
    "an address": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}]},
        "http://a/b.png",
    ),
    "a stream": ({**ASKED, "stream": True}, "stream is True, which is not possible"),
    "an unknown parameter": ({**ASKED, "tools": []}, "there is no parameter 'tools'"),
    "a wrong value": ({**ASKED, "temperature": "hot"}, "temperature is 'hot'; it must be a number"),
    "out of bounds": ({**ASKED, "top_p": 2}, "top_p is 2.0"),
    "too long": ({**ASKED, "max_tokens": 5000}, "max_new_tokens is 5000; choose 1 to 4096"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_named(name: str) -> None:
    body, says = REFUSED[name]
    reply = post(Asked(), body)
    assert reply.status_code == 400 and reply.json["error"]["type"] == "invalid_request_error"
    assert says in reply.json["error"]["message"]


def test_the_form_of_an_answer() -> None:
    tokenizer = Tokenizer(qwen2_tokenizer(300))
    tokens = [ChosenToken(token, -0.5, ((token, -0.5),)) for token in tokenizer.encode("Hi")]
    names = {"id": "chatcmpl-1", "created": 5, "model": "m"}
    found = completion(GeneratedAnswer(tokens, "Hi", is_complete=False), 7, tokenizer, True, names)
    assert found["choices"][0]["finish_reason"] == "length"
    content = found["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == "Hi" and content[0]["logprob"] == -0.5
    count = len(tokens)
    assert found["usage"] == {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server over a tiny trained run."""
    folder = tmp_path_factory.mktemp("completions")
    launch("megatron_nvlm.train", 1, "--config", str(write_run(folder, training={"train_steps": 3})))
    command = [
        sys.executable,
        "-m",
        "megatron_nvlm.commands.chat_page",
        "--run-dir",
        str(folder / "run"),
        "--port",
        "0",
    ]
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        try:
            found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline() + process.stdout.readline())
            assert found, (folder / "errors").read_text()
            yield found[0]
        finally:
            process.terminate()
            process.wait(30)


def fetch(address: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as reply:
        return json.load(reply)


@pytest.mark.distributed
def test_a_trained_model_answers(server: str) -> None:
    (named,) = fetch(f"{server}/v1/models")["data"]
    assert named["id"] == "run/step_00000003"
    reply = fetch(server + PATH, {**ASKED, "max_tokens": 6, "logprobs": True})
    assert reply["object"] == "chat.completion" and reply["model"] == named["id"]
    (choice,) = reply["choices"]
    asked = {
        "turns": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>What is this?"}],
        "images": [base64.b64encode(IMAGE).decode()],
        **{"temperature": 0, "top_p": 1, "top_k": 0, "repetition_penalty": 1, "max_new_tokens": 6},
    }
    assert choice["message"] == {"role": "assistant", "content": fetch(f"{server}/ask", asked)["answer"]}
    written = reply["usage"]["completion_tokens"]
    assert len(choice["logprobs"]["content"]) == written <= 6
    assert choice["finish_reason"] == ("length" if written == 6 else "stop")
