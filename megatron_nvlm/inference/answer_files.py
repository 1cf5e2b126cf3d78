"""Answers all questions of a file. The first rank reads and writes, all ranks compute, replicas share the questions out."""

import sys
import time
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from tqdm import tqdm

from megatron_nvlm.data.prepare import PreparedSample
from megatron_nvlm.data.shards.records import RawSample
from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.answers import answer
from megatron_nvlm.inference.request_files import AnswerFile, Request, load_request, read_requests
from megatron_nvlm.inference.sampling import Sampling
from megatron_nvlm.parallel.groups import get_groups
from megatron_nvlm.runs.restore import TrainedRun

LINES_EVERY_SECONDS = 10
Sent = TypeVar("Sent")


def from_first_rank(value: Sent) -> Sent:
    """What rank 0 calls it with, on every rank; all call it together."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class _Progress:
    """How many are done: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self.bar = tqdm(total=total, initial=done, unit="question") if sys.stderr.isatty() else None
        self.told_at = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
            if self.done == self.total:
                self.bar.close()
        elif self.done == self.total or time.monotonic() - self.told_at > LINES_EVERY_SECONDS:
            print(f"{self.done} of {self.total} questions", flush=True)
            self.told_at = time.monotonic()


def answer_file(
    trained: TrainedRun, inputs: Path, outputs: Path, batch_size: int, max_new_tokens: int, sampling: Sampling
) -> int:
    """Answer what has no answer yet; every rank calls it.

    Args:
        batch_size: questions that a model replica answers at once.

    Returns:
        Lines that could not be answered; each stands in the outputs with its reason.
    """
    first = dist.get_rank() == 0
    at_once = batch_size * get_groups().dp.size()
    requests: list[Request] = []
    if first:
        everything = read_requests(inputs)
        answers = AnswerFile(outputs)
        requests = [request for request in everything if request.id not in answers.done]
        if len(requests) < len(everything):
            print(
                f"{len(everything) - len(requests)} of {len(everything)} questions have their answer already",
                flush=True,
            )
        progress = _Progress(len(everything) - len(requests), len(everything))
    failed = 0
    for start in range(0, from_first_rank(len(requests)), at_once):
        some = requests[start : start + at_once]
        raws = from_first_rank([_load(one, inputs.parent) for one in some])
        results = _answer(trained, raws, max_new_tokens, sampling)
        failed += sum(error != "" for _, error in results)
        if first:
            answers.write(
                [
                    (request, text, _named(request, inputs, error))
                    for request, (text, error) in zip(some, results, strict=True)
                ]
            )
            progress.add(len(some))
    return failed


def _named(request: Request, inputs: Path, error: str) -> str:
    """The reason with its line, told on the terminal too; empty if there is none."""
    if not error:
        return ""
    named = f"line {request.line} of {inputs}: {error}"
    print(named, file=sys.stderr, flush=True)
    return named


def _load(request: Request, folder: Path) -> RawSample | str:
    """The question, or why it is none."""
    try:
        return load_request(request, folder)
    except UserError as error:
        return str(error)


def _answer(
    trained: TrainedRun, raws: list[RawSample | str], max_new_tokens: int, sampling: Sampling
) -> list[tuple[str, str]]:
    """(answer, error) of each; every rank knows all."""
    replicas = get_groups().dp
    own: dict[int, tuple[str, str]] = {}
    prepared: dict[int, PreparedSample] = {}
    for number in range(replicas.rank(), len(raws), replicas.size()):
        raw = raws[number]
        if isinstance(raw, str):
            own[number] = "", raw
            continue
        try:
            prepared[number] = trained.pipeline.prepare(raw, open_answer=True)
        except UserError as error:
            own[number] = "", str(error)
    texts = answer(trained, list(prepared.values()), max_new_tokens, sampling)
    own |= {number: (text, "") for number, text in zip(prepared, texts, strict=True)}
    parts: list[dict[int, tuple[str, str]]] = [{} for _ in range(replicas.size())]
    dist.all_gather_object(parts, own, group=replicas)
    everything = {number: result for part in parts for number, result in part.items()}
    return [everything[number] for number in range(len(raws))]
