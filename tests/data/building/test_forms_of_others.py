"""Lines as other projects document them become the turns that they mean."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.data.building.forms import to_question
from tests.data.building.builds import build_lines, colours_of, turns_of

EXAMPLES: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "ms-swift messages": (
        {
            "messages": [
                {"role": "user", "content": "<image>What is in the picture?"},
                {"role": "assistant", "content": "A square"},
            ],
            "images": ["red.png"],
        },
        [("human", "<image>What is in the picture?"), ("gpt", "A square")],
    ),
    "ms-swift query": (
        {
            "system": "Be brief.",
            "query": "55555",
            "response": "66666",
            "images": ["red.png"],
            "history": [["<image>query1", "response1"], ["query2", "response2"]],
        },
        [
            ("system", "Be brief."),
            *(("human", "<image>query1"), ("gpt", "response1"), ("human", "query2"), ("gpt", "response2")),
            *(("human", "55555"), ("gpt", "66666")),
        ],
    ),
    "Alpaca": (
        {
            "instruction": "Sum up.",
            "input": "A long text.",
            "output": "A text.",
            "system": "S",
            "history": [["a", "b"]],
        },
        [("system", "S"), ("human", "a"), ("gpt", "b"), ("human", "Sum up.\nA long text."), ("gpt", "A text.")],
    ),
    "Alpaca without input": (
        {"instruction": "Name a colour.", "input": "", "output": "Red.", "history": None},
        [("human", "Name a colour."), ("gpt", "Red.")],
    ),
    "Alpaca with a picture": (
        {"instruction": "<image>What?", "output": "Red.", "images": ["red.png"]},
        [("human", "<image>What?"), ("gpt", "Red.")],
    ),
    "The Cauldron": (
        {
            "images": ["red.png"],
            "texts": [
                {"user": "What colour?", "assistant": "Red.", "source": "VQAv2"},
                {"user": "Which form?", "assistant": "A square.", "source": "VQAv2"},
            ],
        },
        [
            ("human", "<image>\nWhat colour?"),
            *(("gpt", "Red."), ("human", "Which form?"), ("gpt", "A square.")),
        ],
    ),
    "Qwen-VL": (
        {
            "id": "identity_0",
            "conversations": [
                {"from": "user", "value": "Picture 1: <img>red.png</img>\nWhat colour?"},
                {"from": "assistant", "value": "Red."},
            ],
        },
        [("human", "Picture 1: <image>\nWhat colour?"), ("gpt", "Red.")],
    ),
    "VQAv2": (
        {
            "image": "red.png",
            "question": "What is this?",
            "answers": [
                {"answer": "net", "answer_confidence": "maybe", "answer_id": 1},
                {"answer": "square", "answer_confidence": "yes", "answer_id": 2},
                {"answer": "square", "answer_confidence": "yes", "answer_id": 3},
            ],
        },
        [("human", "<image>\nWhat is this?"), ("gpt", "square")],
    ),
    "VQAv2 with its choice": (
        {
            "question": "What is this?",
            "multiple_choice_answer": "net",
            "answers": [{"answer": "square"}, {"answer": "square"}],
        },
        [("human", "What is this?"), ("gpt", "net")],
    ),
    "answers as texts": (
        {"question": "What?", "answers": ["a", "b", "b"]},
        [("human", "What?"), ("gpt", "b")],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_line_of_another_project(tmp_path: Path, name: str) -> None:
    line, turns = EXAMPLES[name]
    (sample,), rejects = build_lines(tmp_path, line)
    assert rejects == [] and turns_of(sample) == turns
    assert colours_of(sample) == (["red"] if "red.png" in str(line) else [])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"query": "a"}, "it has no 'response', so there is nothing to learn"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "its 'input' is no text"),
        ({"instruction": "a", "output": ""}, "its 'output' is empty"),
        ({"query": "a", "response": "b", "history": [["x"]]}, "no list of pairs [question, answer]"),
        ({"query": "a", "response": "b", "history": [["x", 3]]}, "its 'history' holds what is no text"),
        ({"texts": ["a"]}, "its 'texts' is no list of entries"),
        ({"texts": [{"user": "a"}]}, "its 'assistant' is empty or no text"),
        ({"question": "a", "answers": [{"answer": 3}]}, "its 'answer' is empty or no text"),
        ({"query": "a", "response": "b", "meta": {"image": "red.png"}}, "its 'meta.image' names the picture"),
    ],
)
def test_a_broken_one_is_a_named_reject(tmp_path: Path, line: dict[str, Any], says: str) -> None:
    samples, (reject,) = build_lines(tmp_path, line)
    assert samples == [] and says in reject


@pytest.mark.parametrize("name", ["ms-swift query", "Alpaca", "VQAv2"])
def test_a_question_is_asked_without_its_answer(name: str) -> None:
    line, turns = EXAMPLES[name]
    assert [(turn["from"], turn["value"]) for turn in to_question(line)[0]] == turns[:-1]


def test_a_field_of_another_form_is_counted_as_not_read(tmp_path: Path) -> None:
    build_lines(tmp_path, {"question": "a", "answer": "b", "input": "c", "response": "d"})
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["unread"] == {"field input": 1, "field response": 1}
