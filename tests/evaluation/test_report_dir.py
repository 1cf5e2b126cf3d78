"""Which answers a later start goes on with, and whose a model's folder in a report is."""

import json
from pathlib import Path

import pytest

from megatron_nvlm.errors import UserError
from megatron_nvlm.evaluation.benchmarks.models import ModelFacts, cut_at
from megatron_nvlm.evaluation.benchmarks.report_dir import (
    TaskFiles,
    begin_task,
    open_model_folder,
    questions_hash,
    read_answers,
)
from megatron_nvlm.evaluation.benchmarks.scoring import mean_and_error
from megatron_nvlm.inference.sampling import Sampling

FACTS = ModelFacts("ours", "run", "/runs/ours", "h", 3, {"weights": 1})
SAMPLING = Sampling(max_new_tokens=4)


def asked(key: str, text: str = "?") -> dict[str, object]:
    return {
        "id": key,
        "conversation": [{"from": "human", "value": text}],
        "images": [f"/{key}.png"],
        "image_bytes": [5],
    }


def write_answers(files: TaskFiles, *keys: str) -> None:
    lines = [json.dumps({**asked(key), "answer": f"{key}\u2028\x85"}, ensure_ascii=False) for key in keys]
    files.answers.write_bytes("".join(f"{line}\n" for line in lines).encode())


def test_answers_stay_while_the_question_is_the_same(tmp_path: Path) -> None:
    files = TaskFiles(tmp_path, "task")
    assert begin_task(files, FACTS, [asked("a"), asked("b")], SAMPLING) == ""
    write_answers(files, "a", "b")
    assert begin_task(files, FACTS, [asked("a"), asked("b"), asked("c")], SAMPLING) == ""
    assert read_answers(files) == {"a": "a\u2028\x85", "b": "b\u2028\x85"}
    said = begin_task(files, FACTS, [asked("a", "Changed?"), {**asked("b"), "image_bytes": [6]}], SAMPLING)
    assert said == "task: 2 answers are of questions that have changed or are gone" and read_answers(files) == {}


@pytest.mark.parametrize(
    ("facts", "sampling", "what"),
    [
        (ModelFacts("ours", "run", "/runs/ours", "h", 3, {"weights": 2}), SAMPLING, "the model changed"),
        (FACTS, Sampling(max_new_tokens=5), "the greedy length changed"),
        (FACTS, Sampling(max_new_tokens=4, stop=("x",)), "stop changed"),
    ],
)
def test_other_weights_or_settings_begin_anew(tmp_path: Path, facts: ModelFacts, sampling: Sampling, what: str) -> None:
    files = TaskFiles(tmp_path, "task")
    begin_task(files, FACTS, [asked("a")], SAMPLING)
    write_answers(files, "a")
    files.result.write_text("{}")
    said = begin_task(files, facts, [asked("a")], sampling)
    assert what in said and "begins anew" in said and not files.answers.exists() and not files.result.exists()
    assert b'"a"' in files.old_answers.read_bytes()


def test_a_file_that_holds_something_else_is_not_touched(tmp_path: Path) -> None:
    files = TaskFiles(tmp_path, "task")
    begin_task(files, FACTS, [asked("a")], SAMPLING)
    files.answers.write_text("notes\nof mine\n")
    with pytest.raises(UserError, match="line 1 of .* is no answer"):
        begin_task(files, FACTS, [asked("a")], SAMPLING)
    assert files.answers.read_text() == "notes\nof mine\n"


def test_a_folder_is_of_one_model(tmp_path: Path) -> None:
    open_model_folder(tmp_path, FACTS)
    open_model_folder(tmp_path, ModelFacts("ours", "run", "/runs/ours", "h", 4, {"weights": 2}))
    with pytest.raises(UserError, match="give /runs/theirs another name with --name"):
        open_model_folder(tmp_path, ModelFacts("ours", "run", "/runs/theirs", "h", 3))
    with pytest.raises(UserError, match="names no folder"):
        open_model_folder(tmp_path, ModelFacts("../ours", "run", "/runs/ours", "h", 3))


def test_where_images_lie_is_no_part_of_the_question() -> None:
    elsewhere = {**asked("a"), "images": ["/other/a.png"]}
    assert questions_hash([asked("a")], SAMPLING) == questions_hash([elsewhere], SAMPLING)
    assert questions_hash([asked("a")], SAMPLING) != questions_hash([asked("a", "Why?")], SAMPLING)


def test_means_and_stop_strings() -> None:
    assert mean_and_error([1.0, 0.0, 1.0, 0.0]) == (0.5, pytest.approx((1 / 3 / 4) ** 0.5))
    assert mean_and_error([1.0]) == (1.0, 0.0)
    assert cut_at("one two three", ("three", "two")) == "one " and cut_at("one", ("two",)) == "one"
