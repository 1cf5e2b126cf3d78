"""Task files: what the package has, what is refused, and what a question of each becomes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_nvlm.errors import UserError
from megatron_nvlm.evaluation.scorers.registry import RUN_CODE, SCORERS, Truth
from megatron_nvlm.evaluation.tasks.read import FOLDER, SUITES, Task, find_task, find_tasks, read_task
from megatron_nvlm.evaluation.tasks.samples import make_questions, read_samples, spell
from megatron_nvlm.inference.request_files import read_requests

OWN: dict[str, Any] = {
    "name": "counting",
    "kind": "text",
    "prompt": "{question}\n{choices}\nA letter.",
    "scorers": ["choice"],
    "split": "all",
    "source": "made here",
}


def own_task(folder: Path, **changes: Any) -> Task:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({**OWN, **changes}))
    return read_task(path)


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_paper_has_nine_tasks_with_images_and_four_without() -> None:
    tasks = find_tasks(SUITES["paper"])
    assert [task.kind for task in tasks] == ["vision-language"] * 9 + ["text"] * 4
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SUITES["paper"]) == {task.name for task in tasks}
    assert all(("{images}" in task.prompt) == (task.kind == "vision-language") for task in tasks)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scorer": "choice"}, "unknown key scorer; did you mean scorers?"),
        ({"prompt": "{question} {choice}"}, "prompt has {choice}; known are choices, images, question"),
        ({"prompt": "{question"}, "prompt is no template"),
        ({"prompt": "What?"}, "it must be text with {question}"),
        ({"scorers": ["exakt"]}, "no scorer 'exakt'; did you mean exact?"),
        ({"scorers": ["python_tests"]}, "needs tests; say under fields"),
        ({"kind": "audio"}, "it must be one of vision-language, text"),
        ({"few_shot": "many"}, "few_shot has a value of the wrong type"),
        ({"name": "My task"}, "it must be lower case letters, digits and _"),
        ({"choice_answers": "number"}, "it must be letter, index, text"),
        ({"image": "<image><image>"}, "it must be text with one <image>"),
        ({"shots_of": "subject"}, "it must be a name of fields"),
    ],
)
def test_mistakes_of_a_task_file_are_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        own_task(tmp_path, **changes)
    assert sentence in str(error.value) and str(tmp_path / "own.yaml") in str(error.value)


def test_a_missing_key_and_an_unknown_name_are_named(tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text("name: half\n")
    with pytest.raises(UserError, match="half.yaml: the key kind is missing"):
        find_task(str(path))
    with pytest.raises(UserError, match="no task 'chartq'; did you mean chartqa?"):
        find_task("chartq")
    with pytest.raises(UserError, match="two tasks are named mmlu"):
        find_tasks(["mmlu", "mmlu"])


def test_the_prompts_of_the_paper_as_they_are_asked(tmp_path: Path) -> None:
    """Spelled out by hand from the release's scripts; the last of each is what ends the prompt."""
    single = "Answer the question using a single word or phrase."
    letter = "Answer with the option's letter from the given choices directly."
    common = {"question": "Why?", "images": ["a.png"], "answer": "no", "answers": ["no"] * 10}
    chosen = {**common, "options": ["yes", "no"], "choices": ["yes", "no"]}
    ids = {"question_id": 1, "questionId": 1}
    expected = {
        "chartqa": (common, f"<image>\nWhy?\n{single}"),
        "vqav2": ({**common, **ids}, f"<image>\nWhy?\n{single}"),
        "textvqa": ({**common, **ids}, "<image>\nWhy?\nAnswer the question using a single word, phrase, or number."),
        "docvqa": ({**common, **ids}, "<image>\nWhy?\nAnswer the question using a single word, phrase, or number."),
        "ocrbench": (common, "<image>\nWhy?"),
        "ai2d": ({**chosen, "answer": "1"}, f"<image>\nWhy?\nA. yes\nB. no\n{letter}"),
        "mathvista": ({**chosen, "query": "Hint."}, f"<image>\nWhy?\nA. yes\nB. no\n{letter}"),
        "realworldqa": ({**chosen, "answer": "B"}, f"<image>\nWhy?\nA. yes\nB. no\n{letter}"),
        "mmmu": (
            {**chosen, "images": ["a.png", "b.png"], "answer": "B"},
            f"<image 1><image> <image 2><image>\nWhy?\nA. yes\nB. no\n{letter}",
        ),
    }
    assert set(expected) == set(SUITES["vision"])
    for name, (line, prompt) in expected.items():
        task = find_task(name)
        (sample,) = read_samples(task, write_lines(tmp_path / "data.jsonl", line))
        assert spell(task, sample) == prompt
        assert sample.truth.texts == (("B",) if sample.truth.choices else ("no",) * len(sample.truth.texts))
        assert SCORERS[task.scorers[0]]("B" if sample.truth.choices else "no", sample.truth) == 1.0
    open_line = {**common, "query": "Please answer.\nWhy?", "pid": 3}
    (sample,) = read_samples(find_task("mathvista"), write_lines(tmp_path / "data.jsonl", open_line))
    assert spell(find_task("mathvista"), sample) == "<image>\nPlease answer.\nWhy?" and sample.id == "3"


def test_examples_are_earlier_turns_of_the_same_subject(tmp_path: Path) -> None:
    task = find_task("mmlu")
    line = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}
    shots = [
        {**line, "question": f"{name} {number}?", "subject": name} for number in range(6) for name in ("law", "art")
    ]
    examples = read_samples(task, write_lines(tmp_path / "shots.jsonl", *shots))
    samples = read_samples(task, write_lines(tmp_path / "data.jsonl", {**line, "subject": "art"}))
    (question,) = make_questions(task, samples, examples, tmp_path)
    turns = question["conversation"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * 5 + ["human"]
    assert [turn["value"].split("\n")[0] for turn in turns[::2]] == [f"art {n}?" for n in range(5)] + ["2 + 2?"]
    assert {turn["value"] for turn in turns[1::2]} == {"B"}
    with pytest.raises(UserError, match="has 0 examples of subject 'zoo', and the task mmlu shows 5"):
        make_questions(
            task, read_samples(task, write_lines(tmp_path / "d", {**line, "subject": "zoo"})), examples, tmp_path
        )


def test_questions_are_those_that_generate_reads(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    line = {"id": "x", "question": "Why {not}?", "images": "a.png", "answer": "no", "query": "", "pid": "x"}
    task = find_task("mathvista")
    line["query"] = "Why {not}?"
    questions = make_questions(task, read_samples(task, write_lines(tmp_path / "d", line)), [], tmp_path)
    assert questions[0]["images"] == [str(tmp_path / "a.png")] and questions[0]["image_bytes"] == [5]
    (request,) = read_requests(write_lines(tmp_path / "q", *questions))
    assert request.error == "" and request.id == "x" and list(request.images) == questions[0]["images"]
    assert [turn["from"] for turn in request.turns] == ["system", "human"] and "{not}" in request.turns[1]["value"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"question": "?"}, "it has no 'answers', so no answer can be scored"),
        ({"answers": "A"}, "its 'question' is empty or no text"),
        ({"question": "?", "answers": "C", "choices": ["x", "y"]}, "its answer 'C' is no letter of its 2 choices"),
        ({"question": "?", "answers": "A", "images": ["a.png"]}, "is about text; leave them out"),
        ({"question": "?", "answers": "A", "id": [1]}, "its 'id' is neither text nor a whole number"),
        ({"question": "?", "answers": {"answer": [1]}}, "neither text nor a number"),
    ],
)
def test_mistakes_of_data_name_the_line(tmp_path: Path, line: dict[str, Any], sentence: str) -> None:
    task = own_task(tmp_path)
    good = {"question": "?", "answers": "A", "choices": ["x", "y"]}
    with pytest.raises(UserError) as error:
        read_samples(task, write_lines(tmp_path / "d.jsonl", good, line))
    assert sentence in str(error.value) and "line 2 of" in str(error.value)


def test_an_id_may_be_missing_and_stands_once(tmp_path: Path) -> None:
    task = own_task(tmp_path, scorers=["exact"])
    line = {"question": "?", "answers": 7}
    samples = read_samples(task, write_lines(tmp_path / "d.jsonl", line, {**line, "id": 5}))
    assert [sample.id for sample in samples] == ["line 1", "5"] and samples[0].truth.texts == ("7",)
    with pytest.raises(UserError, match="its id '5' is that of line 1 too"):
        read_samples(task, write_lines(tmp_path / "d.jsonl", {**line, "id": 5}, {**line, "id": "5"}))


NUMBER_CASES = [
    ("gsm8k", "So 3 + 4 = 7 apples.", "3 + 4 = 7\n#### 7", 1.0),
    ("gsm8k", "It is $1,234.50", "#### 1234.5", 1.0),
    ("gsm8k", "#### 8 and then 7", "#### 8", 1.0),
    ("gsm8k", "nothing", "#### 8", 0.0),
    ("gsm8k", "7" * 9000, "#### 8", 0.0),
    ("math_boxed", "\\boxed{1e999999999}", "\\boxed{8}", 0.0),
    ("math_boxed", "\\boxed{\\frac{1}{0}}", "\\boxed{8}", 0.0),
    ("math_boxed", "\\boxed{-\\frac{3}{2}}", "\\boxed{-1.5}", 1.0),
    ("gsm8k_strict", "It is 8", "#### 8", 0.0),
    ("gsm8k_strict", "#### 8", "#### 8", 1.0),
    ("math_boxed", "so \\boxed{\\dfrac{1}{2}}.", "we get $\\boxed{\\frac12}$", 1.0),
    ("math_boxed", "The answer is 0.5", "\\boxed{\\frac{1}{2}}", 1.0),
    ("math_boxed", "\\boxed{10,\\!000}", "\\boxed{10000}", 1.0),
    ("math_boxed", "\\boxed{x = 3}", "\\boxed{3}", 1.0),
    ("math_boxed", "\\boxed{\\left( 1, 2 \\right)}", "\\boxed{(1,2)}", 1.0),
    ("math_boxed", "first \\boxed{1} then \\boxed{2}", "\\boxed{1}", 0.0),
    ("math_boxed", "\\boxed{5\\text{ cm}}", "\\boxed{5}", 1.0),
]


@pytest.mark.parametrize(("scorer", "answer", "truth", "score"), NUMBER_CASES)
def test_results_of_reasoning(scorer: str, answer: str, truth: str, score: float) -> None:
    assert SCORERS[scorer](answer, Truth((truth,))) == score


def test_functions_are_run_against_their_tests() -> None:
    question = 'from math import floor\n\ndef half(x: int) -> int:\n    """Half of it."""\n'
    fields = {"tests": "def check(f):\n    assert f(5) == 2\n", "entry_point": "half"}
    score = SCORERS["python_tests"]
    truth = Truth((), question=question, fields=fields)
    assert RUN_CODE == ("python_tests",)
    assert score("```python\ndef half(x):\n    return floor(x / 2)\n```", truth) == 1.0
    assert score("    return floor(x / 2)\n", truth) == 1.0
    assert score("def half(x):\n    return x\n", truth) == 0.0
    assert score("I cannot.", truth) == 0.0
    assert score("import sys\nsys.exit(0)\ndef half(x):\n    return x\n", truth) == 0.0


def test_a_truth_with_choices_is_a_letter() -> None:
    truth = Truth(("B",), ("yes", "no"))
    assert SCORERS["release_mmmu"]("It is (B)", truth) == SCORERS["choice"]("B", truth) == 1.0
    first = Truth(("A",), ("yes", "no"))  # an answer that names none
    assert SCORERS["release_mmmu"]("hm", first) == 1.0 and SCORERS["harness_mmmu"]("hm", first) == 0.0
    assert SCORERS["release_ocrbench"]("a b", Truth(("ab",), fields={"dataset": "HME100k"})) == 1.0
    assert SCORERS["release_ocrbench"]("a b", Truth(("ab",), fields={"dataset": "TextVQA"})) == 0.0
