"""The command `megatron_nvlm.generate` over a run that was really trained, with virtual pipeline stages."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.chat import HELP
from megatron_nvlm.inference.request_files import AnswerFile, read_requests
from tests.support.launch import command, environment, launch
from tests.support.pictures import avif_with_a_hole
from tests.support.trained import train_demo

MODULE = "megatron_nvlm.generate"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on two stages of two chunks each."""
    virtual = (
        "parallelism.pipeline_model_parallel_size=2",
        "parallelism.virtual_pipeline_model_parallel_size=2",
        "parallelism.payload_vision_tokens=256",
    )
    return train_demo(tmp_path_factory.mktemp("generate"), 2, 2, "h", 2, *virtual)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "two_to_three.png"
    Image.radial_gradient("L").resize((112, 168)).convert("RGB").save(path)
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.distributed
def test_a_file_of_questions_under_two_layouts(run_dir: Path, image: Path, tmp_path: Path) -> None:
    """A virtual layout opens joined, and on pipeline stages; bad lines are answered with their reason, and asked again."""
    (tmp_path / "a.png").write_bytes(image.read_bytes())
    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:200])
    turns = [{"from": "human", "value": "<image>\nRead red."}, {"from": "gpt", "value": "3"}]
    questions = [
        {"id": "text", "question": "What is 3?", "note": "kept"},
        {"id": 2, "question": "Read red.", "images": ["a.png"]},
        {"id": "broken", "question": "Read red.", "images": ["broken.png"]},
        {"id": "truth is left out", "conversation": turns, "images": [str(image)]},
        {"id": "two", "question": "Read red in <image> and in <image>.", "images": ["a.png", "a.png"]},
        {"id": "places", "question": "Read <image>.", "images": ["a.png", "a.png"]},
    ]
    inputs = tmp_path / "in.jsonl"
    inputs.write_text("\n".join(map(json.dumps, questions)) + '\n\n{"id": "half\n')
    common = ("--run-dir", str(run_dir), "--inputs", str(inputs), "--max-new-tokens", "5", "--temperature", "0.8")
    common += ("--logprobs", "1", "--top-k", "40", "--repetition-penalty", "1.1", "--stop", "~~~")

    joined = launch(MODULE, 1, *common, "--outputs", str(tmp_path / "joined.jsonl"), "--batch-size", "3", check=False)
    assert joined.returncode == 1 and "3 lines could not be answered" in joined.stdout
    assert "7 of 7 questions" in joined.stdout
    found = lines_of(tmp_path / "joined.jsonl")
    assert [line["id"] for line in found] == ["text", 2, "broken", "truth is left out", "two", "places", "line 8"]
    assert all(len(token["top_logprobs"]) == 1 for token in found[0]["logprobs"])
    assert found[0]["note"] == "kept" and all("answer" in found[place] for place in (0, 1, 3, 4))
    for place, line, reason in ((2, 3, "cannot be decoded"), (5, 6, "2 images"), (6, 8, "its JSON is broken")):
        assert re.match(f"line {line} of {inputs}: .*{reason}", found[place]["error"])
        assert found[place]["error"] in joined.stderr

    # What has an answer is not asked again, and what was half written is forgotten; the rest is as if it had been alone.
    staged = tmp_path / "staged.jsonl"
    staged.write_text(json.dumps({**found[1], "answer": "from before"}) + "\n" + json.dumps(found[2]) + '\n{"id": "te')
    (tmp_path / "broken.png").write_bytes(image.read_bytes())
    stages = "parallelism.pipeline_model_parallel_size=2"
    again = launch(MODULE, 2, *common, "--outputs", str(staged), stages, check=False)
    assert "1 of 7 questions have their answer already" in again.stdout
    answers = {line["id"]: line.get("answer") for line in lines_of(staged)}
    assert answers[2] == "from before" and answers["broken"] is not None
    for line in (found[0], found[3], found[4]):
        assert answers[line["id"]] == line["answer"]


@pytest.mark.distributed
def test_a_conversation_on_the_terminal(run_dir: Path, image: Path, tmp_path: Path) -> None:
    """On two ranks: a question goes with what was said before; a picture that is not there, or too few, end nothing."""
    said = ["/image nothing.png", f"/image {image}", "Read red.", "And <image>?", "And blue?", "/new", "What is 3?"]
    settings = ("--run-dir", str(run_dir), "--max-new-tokens", "8")
    done = subprocess.run(
        command(MODULE, 2, *settings, "--chat"),
        input="\n".join(said) + "\n",
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout[done.stdout.index(HELP) :].splitlines()[1:]
    assert told[0].startswith("error: the image nothing.png cannot be read")
    assert told[1] == "1 with the next question" and told[3].startswith("error: its conversation has 2 <image>")
    first, second, third = told[2], told[4], told[6]
    assert told[5] == "begun again" and first and second and third

    # The same as questions of a file, the second with the first and its answer before it, and alone.
    asked: list[dict[str, str]] = [{"from": "human", "value": "<image>\nRead red."}]
    both = [*asked, {"from": "gpt", "value": first}, {"from": "human", "value": "And blue?"}]
    lines = [
        {"id": "first", "conversation": asked, "images": [str(image)]},
        {"id": "second", "conversation": both, "images": [str(image)]},
        {"id": "alone", "question": "And blue?"},
        {"id": "third", "question": "What is 3?"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    launch(MODULE, 1, *settings, "--inputs", str(tmp_path / "in.jsonl"), "--outputs", str(tmp_path / "out.jsonl"))
    answers = {line["id"]: line["answer"] for line in lines_of(tmp_path / "out.jsonl")}
    assert (answers["first"], answers["second"], answers["third"]) == (first, second, third)
    assert answers["alone"] != second


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--inputs", "in.jsonl"), "--inputs and --outputs belong together"),
        (("--question", "?", "--temperature", "-1"), "argument --temperature: -1 is under 0"),
        (("--question", "?", "--logprobs", "1"), "--logprobs are written to --outputs"),
        (("--question", "?", "--beams", "2", "--top-k", "5"), "beams draw nothing"),
        (("--question", "?", "--image", "nothing.png"), "the image nothing.png cannot be read"),
    ],
)
def test_mistakes_end_with_a_sentence(arguments: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    done = launch(MODULE, 1, "--run-dir", str(tmp_path), *arguments, check=False)
    assert done.returncode and re.search(f"^error: .*{re.escape(sentence)}", done.stderr, re.MULTILINE)


@pytest.mark.distributed
def test_a_damaged_picture_is_named_before_the_run_is_opened(tmp_path: Path) -> None:
    (tmp_path / "hole.avif").write_bytes(avif_with_a_hole())
    asked = ("--question", "?", "--image", str(tmp_path / "hole.avif"))
    done = launch(MODULE, 1, "--run-dir", str(tmp_path), *asked, check=False)
    sentence = f"^error: {re.escape(str(tmp_path))}/hole.avif: the image cannot be decoded"
    assert done.returncode and re.search(sentence, done.stderr, re.MULTILINE)


def test_lines_that_are_no_question(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"question": "no id"}\n[]\n{"id": 1, "question": "a"}\n{"id": "1", "question": "b"}\n'
        '{"id": 2}\n{"id": 3, "question": "c", "images": {"a": 1}}\n{"id": {}, "question": "d"}\n'
    )
    requests = read_requests(path)
    assert [request.id for request in requests] == ["line 1", "line 2", "1", "line 4", "2", "3", "line 7"]
    reasons = ["", "JSON is no object", "", "line 3 too", "has none of these", "list of paths", "neither text"]
    for request, reason in zip(requests, reasons, strict=True):
        assert reason in request.error and bool(reason) == bool(request.error)


def test_a_file_that_holds_something_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nof today\n")
    with pytest.raises(UserError, match="line 1 of .* is no answer"):
        AnswerFile(path)
    assert path.read_text() == "my notes\nof today\n" and os.listdir(tmp_path) == ["notes.txt"]
