"""What the chat page's server makes of a question's settings, without a browser and without a model."""

from typing import Any, cast

import pytest

pytest.importorskip("flask", reason="Flask is not installed")

from megatron_nvlm.commands.chat_page import ModelThread, make_app
from megatron_nvlm.inference.sampling import Sampling

ASKED: dict[str, Any] = {
    "turns": [{"from": "human", "value": "What is 3?"}],
    "images": [],
    "temperature": "0.5",
    "top_p": "0.9",
    "top_k": "7",
    "repetition_penalty": "1.2",
    "max_new_tokens": "9",
}


class Asked:
    """Stands for the model: keeps the settings that it is asked with."""

    sampling: Sampling

    def answer(self, raw: Any, sampling: Sampling) -> dict[str, Any]:
        self.sampling = sampling
        return {"answer": "3"}


def test_settings_of_the_page_reach_the_model() -> None:
    model = Asked()
    reply = make_app(cast(ModelThread, model)).test_client().post("/ask", json=ASKED)
    assert reply.json == {"answer": "3"}
    found = model.sampling
    assert (found.temperature, found.top_p, found.top_k) == (0.5, 0.9, 7)
    assert (found.repetition_penalty, found.max_new_tokens) == (1.2, 9)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"repetition_penalty": "0"}, "repetition_penalty is 0.0; it must be above 0"),
        ({"max_new_tokens": "5000"}, "max_new_tokens is 5000; choose 1 to 4096"),
        ({"top_k": "many"}, "something else than a question"),
    ],
)
def test_settings_that_are_refused(change: dict[str, str], sentence: str) -> None:
    reply = make_app(cast(ModelThread, Asked())).test_client().post("/ask", json={**ASKED, **change})
    assert reply.status_code == 400 and sentence in reply.json["error"]
