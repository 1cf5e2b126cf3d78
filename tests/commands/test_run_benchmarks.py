"""Benchmarks of one model from its run directory under TP2 and from its export: the same answers and scores, one table."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from megatron_nvlm.commands.run_benchmarks import main
from megatron_nvlm.evaluation.tasks.read import SUITES
from tests.support.launch import launch, run_command
from tests.support.trained import train_demo

MODULE = "tools.run_benchmarks"
OWN_TASK = {
    "name": "reading",
    "kind": "vision-language",
    "prompt": "{images}\n{question}",
    "scorers": ["exact"],
    "max_new_tokens": 4,
    "few_shot": 1,
    "split": "all",
    "source": "drawn here",
}
OWN_CODE = {
    **OWN_TASK,
    "name": "coding",
    "kind": "text",
    "scorers": ["python_tests"],
    "few_shot": 0,
    "fields": {"tests": "test", "entry_point": "entry_point"},
}
TASKS = "chartqa,ai2d,mmmu,mmlu"


def write_lines(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_data(folder: Path) -> None:
    """A dozen samples in the forms of the tasks."""
    (folder / "images").mkdir(parents=True)
    for number in range(3):
        Image.radial_gradient("L").rotate(30 * number).resize((112, 56 + 28 * number)).save(
            folder / f"images/{number}.png"
        )
    pictures = [f"images/{number}.png" for number in range(3)]
    write_lines(
        folder / "chartqa.jsonl",
        *(
            {"question": f"How many in {year}?", "images": [pictures[year % 3]], "answer": str(year)}
            for year in range(3)
        ),
    )
    write_lines(
        folder / "ai2d.jsonl",
        *(
            {"id": f"d{n}", "question": "Which?", "options": ["a", "b"], "answer": str(n), "images": pictures[n]}
            for n in range(2)
        ),
    )
    write_lines(
        folder / "mmmu.jsonl",
        {"id": "two", "question": "In <image 2>?", "options": ["x", "y"], "answer": "A", "images": pictures[:2]},
        {"id": "open", "question": "How long?", "answer": ["3", "three"], "images": pictures[2:]},
    )
    subject = {"choices": ["1", "2"], "answer": 1, "subject": "sums"}
    write_lines(folder / "mmlu.shots.jsonl", *({"question": f"{n}?", **subject} for n in range(5)))
    write_lines(folder / "mmlu.jsonl", {"question": "1 + 1?", **subject}, {"question": "0 + 2?", **subject})
    tests = {"entry_point": "one", "test": "def check(f):\n    assert f() == 1\n"}
    write_lines(folder / "coding.jsonl", {"question": "def one():\n", **tests})
    write_lines(folder / "reading.shots.jsonl", {"question": "Read.", "images": pictures[:1], "answers": "3"})
    write_lines(
        folder / "reading.jsonl",
        *({"question": f"Read {n}.", "images": [pictures[n]], "answers": "nothing"} for n in range(2)),
    )
    for task in (OWN_TASK, OWN_CODE):
        (folder / f"{task['name']}.yaml").write_text(yaml.safe_dump(task))


@dataclass(frozen=True)
class Place:
    run_dir: Path
    exported: Path
    data: Path
    report: Path

    @property
    def common(self) -> tuple[str, ...]:
        tasks = f"{TASKS},{self.data}/reading.yaml,{self.data}/coding.yaml"
        return ("--tasks", tasks, "--data", str(self.data), "--out", str(self.report))

    def run(self, *more: str, check: bool = True) -> Any:
        """By Megatron on two ranks."""
        layout = "parallelism.tensor_model_parallel_size=2"
        return launch(MODULE, 2, "--run-dir", str(self.run_dir), *self.common, *more, layout, check=check)

    def folder(self, *more: str) -> int:
        """By transformers, in this process; its status."""
        return main(["--hf", str(self.exported), *self.common, "--batch-size", "3", *more])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("benchmarks")
    longer = ("model.max_sequence_length=512", "data.sequence_length=512")  # for the examples of MMLU
    run_dir = train_demo(folder, 2, 2, "h", 1, *longer)
    exported = folder / "exported"
    run_command("tools.convert_checkpoint", "export", "--checkpoint", run_dir, "--out", exported)
    make_data(folder / "data")
    return Place(run_dir, exported, folder / "data", folder / "report")


@pytest.mark.distributed
def test_a_run_under_tp2_and_its_export_answer_and_score_the_same(place: Place) -> None:
    done = place.run("--name", "trained")
    assert "coding: 1 samples, python_tests not scored" in done.stdout
    # Half of the truths become what was answered: questions stay, so nothing is generated again.
    answers = lines_of(place.report / "trained" / "reading.answers.jsonl")
    lines = lines_of(place.data / "reading.jsonl")
    lines[0]["answers"] = answers[0]["answer"]
    assert answers[0]["id"] == "line 1" and answers[0]["answer"]
    write_lines(place.data / "reading.jsonl", *lines)

    told = run_command(MODULE, "--hf", place.exported, *place.common, "--batch-size", 3, "--run-code")
    again = place.run("--name", "trained", "--run-code")
    assert "2 of 2 questions have their answer already" in again.stdout and "coding: 1 samples, " in again.stdout
    scores, other = ([line for line in out.splitlines() if "samples" in line] for out in (told, again.stdout))
    assert len(scores) == 6 and scores == other and "reading: 2 samples, exact 50.0 ± 50.0" in scores
    for task in (*TASKS.split(","), "reading", "coding"):
        mine, theirs = (
            {line["id"]: line["answer"] for line in lines_of(place.report / name / f"{task}.answers.jsonl")}
            for name in ("trained", "exported")
        )
        assert mine == theirs and mine

    content = json.loads((place.report / "report.json").read_text())
    assert [(model["name"], model["kind"], model["variant"], model["step"]) for model in content["models"]] == [
        ("exported", "folder", "h", None),
        ("trained", "run", "h", 2),
    ]
    for task in content["tasks"]:
        assert task["results"]["trained"]["scores"] == task["results"]["exported"]["scores"]
        assert task["results"]["trained"]["asked"]["questions"] == task["results"]["exported"]["asked"]["questions"]
    markdown = (place.report / "report.md").read_text()
    assert "| task | scorer | exported | trained | NVLM-D 72B |" in markdown
    assert "| reading | exact | 50.0 ± 50.0 | 50.0 ± 50.0 |  |" in markdown
    assert "| 86.0 | 82.9 | 83.3 | 84.0 | 79.4 | 82.0 |" in markdown and "different questions" not in markdown
    page = (place.report / "report.html").read_text()
    # The export's model card has the scores of the run's own row.
    carded = place.report.parent / "carded"
    export = ("export", "--checkpoint", place.run_dir, "--out", carded)
    run_command("tools.convert_checkpoint", *export, "--report", place.report / "report.json")
    assert "| reading | exact | 50.0 ± 50.0 | 2 | 1 | {images}<br>{question} |" in (carded / "README.md").read_text()
    assert "## Benchmarks" not in (place.exported / "README.md").read_text()
    assert "50.0 ± 50.0" in page and "http" not in page and "<script" not in page


def test_only_what_is_missing_or_changed_is_asked_again(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(place.run_dir, place.exported, tmp_path / "data", tmp_path / "report")
    make_data(place.data)
    assert place.folder("--limit", "2") == 0
    answers = place.report / "exported" / "chartqa.answers.jsonl"
    first = lines_of(answers)
    assert [line["id"] for line in first] == ["line 1", "line 2"]
    # Marked, to see which are kept; another question, more samples, and half a line of an interrupted start.
    write_lines(answers, *({**line, "answer": "kept"} for line in first))
    answers.write_bytes(answers.read_bytes() + b'{"id": "li')
    lines = lines_of(place.data / "chartqa.jsonl")
    write_lines(place.data / "chartqa.jsonl", lines[0], {**lines[1], "question": "How few?"}, lines[2])
    capsys.readouterr()
    assert place.folder() == 0
    told = capsys.readouterr().out
    assert "chartqa: 1 answers are of questions that have changed or are gone" in told
    assert "1 of 3 questions have their answer already" in told
    assert [line["answer"] == "kept" for line in lines_of(answers)] == [True, False, False]

    # Other weights: everything anew, with the old answers beside.
    weights = next(place.exported.glob("*.safetensors"))
    weights.touch()
    assert place.folder("--limit", "1") == 0
    told = capsys.readouterr().out
    assert "chartqa: the model changed since its answers were written, so it begins anew" in told
    assert len(lines_of(answers)) == 1 and len(lines_of(place.report / "exported" / "chartqa.old.jsonl")) == 3


def test_missing_data_are_listed_and_broken_pictures_counted(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(place.run_dir, place.exported, tmp_path / "data", tmp_path / "report")
    make_data(place.data)
    (place.data / "images" / "0.png").write_bytes(b"no picture")
    options = ["--hf", str(place.exported), "--data", str(place.data), "--out", str(place.report), "--suite", "vision"]
    with pytest.raises(SystemExit) as ended:
        main(options)
    told = capsys.readouterr().out
    assert ended.value.code == 1 and "3 questions could not be answered" in told
    sentence = f"docvqa: not run: put docvqa.jsonl at {place.data}/docvqa.jsonl, a JSON object a line, "
    assert sentence + '{"questionId", "question", "images": [paths], "answers": ...}; validation' in told
    assert "chartqa: 3 samples" in told and "1 without an answer count as wrong" in told
    markdown = (place.report / "report.md").read_text()
    assert [f"| {task} | " in markdown for task in SUITES["vision"]] == [True] * 9
    assert "| docvqa | release_anls | not run | 92.6 |" in markdown and f"put docvqa.jsonl at {place.data}" in markdown
    # Mended, the same command asks these alone.
    make_data(tmp_path / "whole")
    (place.data / "images" / "0.png").write_bytes((tmp_path / "whole" / "images" / "0.png").read_bytes())
    assert main(options) == 0
    mended = capsys.readouterr().out
    assert "2 of 3 questions have their answer already" in mended and "without an answer" not in mended


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--hf", "x", "--run-dir", "y", "--suite", "paper"), "either --run-dir or --hf"),
        (("--hf", "x"), "either --suite or --tasks"),
        (("--hf", "x", "--tasks", "chartqa", "a.b=1"), "are of --run-dir"),
        (("--hf", "x", "--tasks", "chart"), "no task 'chart'; did you mean chartqa?"),
        (("--hf", "x", "--tasks", "my.yaml"), "no task file my.yaml"),
        (("--hf", "x", "--tasks", "broken.yaml"), "broken.yaml: the key kind is missing"),
        (("--hf", "x", "--tasks", "ai2d"), "line 1 of ai2d.jsonl: its 'question' is empty or no text"),
        (("--run-dir", "nothing", "--tasks", "chartqa"), "nothing is no run"),
    ],
)
def test_mistakes_are_one_sentence(
    options: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("name: broken\n")
    (tmp_path / "ai2d.jsonl").write_text("{}\n")
    assert main([*options, "--data", ".", "--out", "report"]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "report").exists()
