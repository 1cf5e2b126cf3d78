"""Benchmarks of a model: answers, scores, and one table beside the paper's own numbers (docs/benchmarks.md).

  torchrun --nproc-per-node N -m tools.run_benchmarks --run-dir RUN --suite paper --data FOLDER --out REPORT
  python -m tools.run_benchmarks --hf DIR --tasks chartqa,my_task.yaml --data FOLDER --out REPORT

FOLDER holds NAME.jsonl for each task (and NAME.shots.jsonl where a task shows examples), with images by relative paths.
REPORT gets a folder for each model, and report.json, report.md, report.html of all models in it. The same command goes on
where it was interrupted. A task without data is listed as not run, with what must be put where.
Status: 0; 1 if questions could not be answered; 2 for a mistake that can be fixed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.errors import UserError
from megatron_nvlm.evaluation.benchmarks.models import AskedModel, FolderModel, RunModel
from megatron_nvlm.evaluation.benchmarks.report import write_report
from megatron_nvlm.evaluation.benchmarks.report_dir import (
    TaskFiles,
    begin_task,
    open_model_folder,
    questions_hash,
)
from megatron_nvlm.evaluation.benchmarks.scoring import missing_data, score_task, write_not_run
from megatron_nvlm.evaluation.tasks.read import SUITES, Task, find_tasks
from megatron_nvlm.evaluation.tasks.samples import Question, TaskSample, make_questions, read_samples
from megatron_nvlm.inference.sampling import Sampling
from megatron_nvlm.option_types import LaunchedParser, local_path, positive_int
from megatron_nvlm.parallel.groups import stop_groups, world_size_from_environment
from megatron_nvlm.runs.entry import global_rank, say, user_errors_end_the_process


@dataclass(frozen=True)
class ReadTask:
    """A task with what is asked."""

    task: Task
    samples: Sequence[TaskSample]
    questions: Sequence[Question]
    missing: str = ""
    """What must be put where before it can run."""

    @property
    def sampling(self) -> Sampling:
        """Greedily, with the task's limits."""
        return Sampling(max_new_tokens=self.task.max_new_tokens, stop=tuple(self.task.stop))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = LaunchedParser(
        prog="python -m tools.run_benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run-dir", type=local_path, metavar="RUN", help="a run directory, answered by Megatron under any layout")
    add("--checkpoint", type=local_path, help="of --run-dir: a folder below checkpoints/; the newest if not given")
    add("--hf", type=local_path, metavar="DIR", help="an exported folder, answered by transformers and its own code")
    add(
        "--suite",
        choices=sorted(SUITES),
        help="paper: its thirteen benchmarks; vision, text: those with and without images",
    )
    add("--tasks", metavar="NAMES", help="names of tasks and paths of task files, joined by commas")
    add("--data", type=local_path, required=True, metavar="FOLDER", help="holds NAME.jsonl of each task")
    add("--out", type=Path, required=True, metavar="REPORT", help="a folder to make, or to go on with")
    add("--name", default="", help="of the model in the report (default: run and step, or folder)")
    add("--batch-size", type=positive_int, default=8, help="questions answered at once (default 8)")
    add("--limit", type=positive_int, help="ask the first samples of each task alone")
    add("--run-code", action="store_true", help="score HumanEval: runs the code that the model wrote")
    add("overrides", nargs="*", help="section.key=value of --run-dir, such as parallelism.tensor_model_parallel_size=2")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """What argparse cannot refuse."""
    if (options.run_dir is None) == (options.hf is None):
        raise UserError("name one model: either --run-dir or --hf")
    if (options.suite is None) == (options.tasks is None):
        raise UserError("say what to run: either --suite or --tasks")
    if options.hf is not None and (options.checkpoint is not None or options.overrides):
        raise UserError("--checkpoint and section.key=value are of --run-dir; leave them out beside --hf")
    if options.hf is not None and world_size_from_environment() > 1:
        raise UserError("an exported folder is answered by one process; start the command without torchrun")
    if not options.data.is_dir():
        raise UserError(f"there is no folder {options.data}; correct --data")


def read_tasks(names: Sequence[str], data: Path, limit: int | None) -> list[ReadTask]:
    """The tasks with their data, as far as these are there; UserError for a mistake in either."""
    found = []
    for task in find_tasks(names):
        missing = missing_data(task, data)
        if missing:
            found.append(ReadTask(task, (), (), missing))
            continue
        samples = read_samples(task, data / task.data_file)[:limit]
        shots = read_samples(task, data / task.shots_file) if task.few_shot else []
        found.append(ReadTask(task, samples, make_questions(task, samples, shots, data)))
    return found


def answer_tasks(model: AskedModel, tasks: Sequence[ReadTask], folder: Path) -> int:
    """Answer what has no answer yet; every rank calls it. Returns how many questions could not be answered."""
    failed = 0
    for one in tasks:
        files = TaskFiles(folder, one.task.name)
        if one.missing:
            continue
        if global_rank() == 0:
            said = begin_task(files, model.facts, one.questions, one.sampling)
            if said:
                print(said, flush=True)
        say(f"{one.task.name}: {len(one.questions)} questions")
        failed += model.answer(files.questions, files.answers, one.sampling)
    return failed


def score_tasks(model: AskedModel, tasks: Sequence[ReadTask], folder: Path, run_code: bool) -> None:
    """Score the answers and print a line for each task; on one rank."""
    fingerprint = model.facts.fingerprint
    for one in tasks:
        files = TaskFiles(folder, one.task.name)
        if one.missing:
            write_not_run(one.task, files, one.missing, fingerprint)
            print(f"{one.task.name}: not run: {one.missing}", flush=True)
        else:
            asked = {"questions": questions_hash(one.questions, one.sampling), "model": fingerprint}
            print(score_task(one.task, one.samples, files, asked, run_code), flush=True)


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = make_parser().parse_intermixed_args(arguments)
    check_options(options)
    names = SUITES[options.suite] if options.suite else [name for name in options.tasks.split(",") if name]
    tasks = read_tasks(names, options.data, options.limit)
    model: AskedModel
    if options.run_dir is not None:
        model = RunModel(options.run_dir, options.checkpoint, options.overrides, options.batch_size, options.name)
    else:
        model = FolderModel(options.hf, options.batch_size, options.name)
    folder = options.out / model.facts.name
    if global_rank() == 0:
        folder = open_model_folder(options.out, model.facts)
    failed = answer_tasks(model, tasks, folder)
    if options.run_dir is not None:
        stop_groups()
    if global_rank() == 0:
        score_tasks(model, tasks, folder, options.run_code)
        print(f"the table is in {', '.join(map(str, write_report(options.out)))}", flush=True)
    if failed:
        say(f"{failed} questions could not be answered; the answers of each task have the reasons under 'error'")
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
