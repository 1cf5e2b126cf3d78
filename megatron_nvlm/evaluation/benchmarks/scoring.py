"""Scores of a task's answers: a mean for each of its scorers, with its standard error."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron_nvlm
from megatron_nvlm.evaluation.benchmarks.report_dir import TaskFiles, read_answers, read_json, write_json, write_lines
from megatron_nvlm.evaluation.scorers.registry import RUN_CODE, SCORERS
from megatron_nvlm.evaluation.tasks.read import Task
from megatron_nvlm.evaluation.tasks.samples import TaskSample


def mean_and_error(scores: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard error of it (0 for one sample)."""
    mean = sum(scores) / len(scores)
    spread = sum((score - mean) ** 2 for score in scores)
    return mean, math.sqrt(spread / (len(scores) - 1) / len(scores)) if len(scores) > 1 else 0.0


def score_task(
    task: Task, samples: Sequence[TaskSample], files: TaskFiles, asked: Mapping[str, str], run_code: bool
) -> str:
    """Score what was answered, and write it; a sample without an answer counts as wrong.

    Args:
        asked: hashes of the questions and of the model.
        run_code: whether scorers may run what the model wrote.

    Returns:
        A line for the terminal.
    """
    answers = read_answers(files)
    scorers = [name for name in task.scorers if run_code or name not in RUN_CODE]
    lines: list[dict[str, Any]] = []
    for sample in samples:
        answer = answers.get(sample.id)
        scores = {name: 0.0 if answer is None else SCORERS[name](answer, sample.truth) for name in scorers}
        lines.append({"id": sample.id, "answer": answer, "truth": sample.truth.texts, "scores": scores})
    write_lines(files.scored, lines)
    told: dict[str, Any] = {}
    for name in task.scorers:
        if name in scorers:
            mean, error = mean_and_error([line["scores"][name] for line in lines])
            told[name] = {"score": mean * task.scale, "error": error * task.scale}
        else:
            told[name] = {"not_scored": "give --run-code to run what the model wrote"}
    missing = sum(sample.id not in answers for sample in samples)
    result = {
        "task": dataclasses.asdict(task),
        "samples": len(samples),
        "unanswered": missing,
        "scores": told,
        "asked": dict(asked),
        "version": megatron_nvlm.__version__,
    }
    write_json(files.result, result)
    shown = ", ".join(f"{name} {score_text(score)}" for name, score in told.items())
    unanswered = f", {missing} without an answer count as wrong" if missing else ""
    return f"{task.name}: {len(samples)} samples, {shown}{unanswered}"


def score_text(score: dict[str, Any]) -> str:
    """A score as tables show it."""
    if "not_scored" in score:
        return "not scored"
    return f"{score['score']:.1f} ± {score['error']:.1f}"


def missing_data(task: Task, folder: Path) -> str:
    """What must be put where before the task can run; empty if it is there."""
    missing = [folder / task.data_file] if not (folder / task.data_file).exists() else []
    if task.few_shot and not (folder / task.shots_file).exists():
        missing.append(folder / task.shots_file)
    if not missing:
        return ""
    put = " and ".join(f"{path.name} at {path.absolute()}" for path in missing)
    return f"put {put}, {task.line_form}; {task.split}. {task.source}"


def write_not_run(task: Task, files: TaskFiles, sentence: str, model: str) -> None:
    """Say in the report that the task did not run; results of an earlier start stay if they are of these weights.

    Args:
        model: hash of the model.
    """
    known = read_json(files.result) if files.result.is_file() else {}
    if known.get("asked", {}).get("model") != model:
        write_json(files.result, {"task": dataclasses.asdict(task), "not_run": sentence})
