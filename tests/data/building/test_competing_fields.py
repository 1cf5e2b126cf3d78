"""A line whose fields tell turns twice is one reject that names them, unless they tell the same."""

from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.data.building.forms import to_question
from megatron_nvlm.errors import UserError
from tests.data.building.builds import build_lines, turns_of

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]
OTHERS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Blue."}]
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "two lists": ({"conversations": TURNS, "messages": OTHERS}, "its 'conversations' and 'messages' tell turns each"),
    "one list without loss": (
        {"conversations": TURNS, "messages": [TURNS[0], {**TURNS[1], "loss": False}]},
        "its 'conversations' and 'messages' tell turns each",
    ),
    "a question beside turns": (
        {"conversations": TURNS, "question": "Which?", "answer": "None."},
        "its 'conversations' and 'question' tell turns each",
    ),
    "three": (
        {"conversation": TURNS, "query": "a", "response": "b", "instruction": "a", "output": "c"},
        "its 'conversation' and 'query' and 'instruction' tell turns each",
    ),
    "with a picture": (
        {"image": "red.png", "conversations": TURNS, "messages": OTHERS},
        "its 'conversations' and 'messages' tell turns each",
    ),
    "caption and text": (
        {"image": "red.png", "caption": "A square.", "text": "A circle."},
        "its 'caption' and 'text' both tell what is learned",
    ),
    "within a turn": (
        {"conversations": [{**TURNS[0], "content": "Which?"}, TURNS[1]]},
        "turn 0 of its conversation has 'value' and 'content', which differ",
    ),
    "speakers of a turn": (
        {"conversations": [TURNS[0], {**TURNS[1], "role": "user"}]},
        "turn 1 of its conversation has 'from' and 'role', which differ",
    ),
}
SAME: dict[str, dict[str, Any]] = {
    "two lists": {
        "conversations": TURNS,
        "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}],
    },
    "a question beside turns": {"conversations": TURNS, "question": "What?", "answer": "Red."},
    "an empty list": {"conversations": TURNS, "messages": []},
    "within a turn": {"conversations": [{**TURNS[0], "content": "What?", "role": "user"}, TURNS[1]]},
    "a caption beside turns": {"conversations": TURNS, "caption": "Others."},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_fields_that_tell_different_turns_are_named(tmp_path: Path, name: str) -> None:
    line, says = DIFFERENT[name]
    samples, rejects = build_lines(tmp_path, line)
    assert samples == [] and len(rejects) == 1 and says in rejects[0], rejects


@pytest.mark.parametrize("name", SAME)
def test_fields_that_tell_the_same_are_read_once(tmp_path: Path, name: str) -> None:
    (sample,), rejects = build_lines(tmp_path, SAME[name])
    assert rejects == [] and turns_of(sample) == [("human", "What?"), ("gpt", "Red.")]


def test_a_question_is_refused_alike() -> None:
    with pytest.raises(UserError, match="'conversations' and 'messages' tell turns each"):
        to_question({"conversations": TURNS[:1], "messages": [{"role": "user", "content": "Which?"}]})
