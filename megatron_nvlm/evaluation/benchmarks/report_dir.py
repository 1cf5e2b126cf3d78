"""The files of a report directory: REPORT/MODEL/TASK.*, and what of them a later start goes on with.

| file | holds |
|---|---|
| `MODEL/model.json` | what the model is |
| `MODEL/TASK.questions.jsonl` | what is asked, in the form of `generate --inputs` |
| `MODEL/TASK.answers.jsonl` | the answers, appended as they come |
| `MODEL/TASK.old.jsonl` | answers of other weights, which are not used |
| `MODEL/TASK.asked.json` | of which weights and settings the answers are |
| `MODEL/TASK.scored.jsonl` | answer, truth and scores of each sample |
| `MODEL/TASK.result.json` | scores of the task |
| `report.json`, `report.md`, `report.html` | the table |
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.evaluation.benchmarks.models import ModelFacts
from megatron_nvlm.evaluation.tasks.samples import Question
from megatron_nvlm.inference.sampling import Sampling
from megatron_nvlm.whole_files import write_whole


@dataclass(frozen=True)
class TaskFiles:
    """Paths of one task of one model."""

    folder: Path
    task: str

    @property
    def questions(self) -> Path:
        """What is asked."""
        return self.folder / f"{self.task}.questions.jsonl"

    @property
    def answers(self) -> Path:
        """What was answered."""
        return self.folder / f"{self.task}.answers.jsonl"

    @property
    def old_answers(self) -> Path:
        """Answers of other weights."""
        return self.folder / f"{self.task}.old.jsonl"

    @property
    def asked(self) -> Path:
        """Of what the answers are."""
        return self.folder / f"{self.task}.asked.json"

    @property
    def scored(self) -> Path:
        """Scores of each sample."""
        return self.folder / f"{self.task}.scored.jsonl"

    @property
    def result(self) -> Path:
        """Scores of the task."""
        return self.folder / f"{self.task}.result.json"


def open_model_folder(report: Path, facts: ModelFacts) -> Path:
    """The folder of a model in the report, made if it is new.

    Raises:
        UserError: it holds another model's answers.
    """
    if "/" in facts.name or facts.name in ("", ".", ".."):
        raise UserError(f"--name is {facts.name!r}, which names no folder; leave out slashes")
    folder = report / facts.name
    described = folder / "model.json"
    if described.is_file():
        known = read_json(described)
        if known.get("path") != facts.path:
            raise UserError(
                f"{folder} has the answers of {known.get('path')}; give {facts.path} another name with --name"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(described, dataclasses.asdict(facts))
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A file that we wrote; UserError if it is broken."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is broken ({error}); remove it and start again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; remove it and start again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    write_whole(path, b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))


def questions_hash(questions: Sequence[Question], sampling: Sampling) -> str:
    """Of what is asked, wherever the images lie; equal for two models if they were asked the same."""
    asked = [[line["id"], line["conversation"], line.get("image_bytes")] for line in questions]
    text = json.dumps([asked, sampling.max_new_tokens, sampling.stop])
    return hashlib.sha256(text.encode()).hexdigest()


def begin_task(files: TaskFiles, facts: ModelFacts, questions: Sequence[Question], sampling: Sampling) -> str:
    """Write what is asked, and keep the answers that are still answers to it.

    Returns:
        A sentence about answers that were not kept; empty if there are none.
    """
    asked = {"model": facts.fingerprint, "max_new_tokens": sampling.max_new_tokens, "stop": list(sampling.stop)}
    said = ""
    if files.answers.is_file():
        before = read_json(files.asked) if files.asked.is_file() else {}
        changed = [
            name
            for name, key in (("the model", "model"), ("the greedy length", "max_new_tokens"), ("stop", "stop"))
            if before.get(key) != asked[key]
        ]
        if changed:
            os.replace(files.answers, files.old_answers)
            said = (
                f"{files.task}: {' and '.join(changed)} changed since its answers were written, so it begins anew; the old "
                f"answers are in {files.old_answers}"
            )
        else:
            said = _keep_answers(files, questions)
    files.result.unlink(missing_ok=True)
    write_lines(files.questions, questions)
    write_json(files.asked, asked)
    return said


def _keep_answers(files: TaskFiles, questions: Sequence[Question]) -> str:
    """Take out answers to questions that are no longer asked so."""
    asked = {line["id"]: line for line in questions}
    kept, dropped = [], 0
    lines = files.answers.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            question = {name: value for name, value in found.items() if name != "answer"}
        except (ValueError, AttributeError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break  # an interrupted start left it half written
            raise UserError(
                f"line {number} of {files.answers} is no answer; remove the file and start again"
            ) from error
        if "answer" in found and asked.get(found.get("id")) == question:
            kept.append(line)
        elif "answer" in found:
            dropped += 1
    write_whole(files.answers, b"".join(kept))
    return f"{files.task}: {dropped} answers are of questions that have changed or are gone" if dropped else ""


def read_answers(files: TaskFiles) -> dict[str, str]:
    """The answers by id."""
    if not files.answers.is_file():
        return {}
    lines = [json.loads(line) for line in files.answers.read_bytes().split(b"\n") if line]
    return {str(line["id"]): line["answer"] for line in lines if "answer" in line}
