"""Answers all questions of a file. The first rank reads and writes, all ranks compute, replicas share the questions out."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from tqdm import tqdm

from megatron_nvlm.data.prepare import PreparedSample
from megatron_nvlm.data.shards.records import RawSample
from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.answers import generate_answers
from megatron_nvlm.inference.decoding import GeneratedAnswer, token_logprobs
from megatron_nvlm.inference.request_files import AnswerFile, Request, load_request, read_requests
from megatron_nvlm.inference.sampling import Sampling
from megatron_nvlm.parallel.groups import get_groups
from megatron_nvlm.runs.restore import TrainedRun
from megatron_nvlm.text.tokenizer import Tokenizer

LINES_EVERY_SECONDS = 10
Question = tuple[RawSample, Sampling]
Answered = dict[str, Any]
"""What a line of the outputs says of an answer."""
Sent = TypeVar("Sent")


def from_first_rank(value: Sent) -> Sent:
    """What rank 0 calls it with, on every rank; all call it together."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class QuestionProgress:
    """How many are done: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self.bar = tqdm(total=total, initial=done, unit="question") if sys.stderr.isatty() else None
        self.told_at = time.monotonic()

    def add(self, count: int) -> None:
        """Count this number as done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
            if self.done == self.total:
                self.bar.close()
        elif self.done == self.total or time.monotonic() - self.told_at > LINES_EVERY_SECONDS:
            print(f"{self.done} of {self.total} questions", flush=True)
            self.told_at = time.monotonic()


def open_questions(inputs: Path, answers: AnswerFile) -> tuple[list[Request], QuestionProgress]:
    """The questions of a file that have no answer yet, and how many have one, which is told."""
    everything = read_requests(inputs)
    requests = [request for request in everything if request.id not in answers.done]
    done = len(everything) - len(requests)
    if done:
        print(f"{done} of {len(everything)} questions have their answer already", flush=True)
    return requests, QuestionProgress(done, len(everything))


def answer_file(trained: TrainedRun, inputs: Path, outputs: Path, batch_size: int, sampling: Sampling) -> int:
    """Answer what has no answer yet; every rank calls it.

    Args:
        batch_size: questions that a model replica answers at once.
        sampling: of lines that say nothing else.

    Returns:
        Lines that could not be answered; each stands in the outputs with its reason.
    """
    first = dist.get_rank() == 0
    at_once = batch_size * get_groups().dp.size()
    requests: list[Request] = []
    if first:
        answers = AnswerFile(outputs)
        requests, progress = open_questions(inputs, answers)
    failed = 0
    for start in range(0, from_first_rank(len(requests)), at_once):
        some = requests[start : start + at_once]
        questions = from_first_rank([_load(one, inputs.parent, sampling) for one in some])
        results = _answer(trained, questions)
        failed += sum(error != "" for _, error in results)
        if first:
            answers.write(
                [
                    (request, found, named_error(request, inputs, error))
                    for request, (found, error) in zip(some, results, strict=True)
                ]
            )
            progress.add(len(some))
    return failed


def named_error(request: Request, inputs: Path, error: str) -> str:
    """The reason with its line, told on the terminal too; empty if there is none."""
    if not error:
        return ""
    named = f"line {request.line} of {inputs}: {error}"
    print(named, file=sys.stderr, flush=True)
    return named


def _load(request: Request, folder: Path, sampling: Sampling) -> Question | str:
    """The question, or why it is none."""
    try:
        return load_request(request, folder), dataclasses.replace(sampling, **request.settings)
    except UserError as error:
        return str(error)


def _answer(trained: TrainedRun, questions: list[Question | str]) -> list[tuple[Answered, str]]:
    """(what the outputs say, error) of each; every rank knows all."""
    replicas = get_groups().dp
    own: dict[int, tuple[Answered, str]] = {}
    prepared: dict[int, tuple[PreparedSample, Sampling]] = {}
    for number in range(replicas.rank(), len(questions), replicas.size()):
        question = questions[number]
        if isinstance(question, str):
            own[number] = {}, question
            continue
        raw, sampling = question
        try:
            prepared[number] = trained.pipeline.prepare(raw, open_answer=True), sampling
        except UserError as error:
            own[number] = {}, str(error)
    samples, samplings = [sample for sample, _ in prepared.values()], [sampling for _, sampling in prepared.values()]
    found = generate_answers(trained, samples, samplings)
    for number, answered, sampling in zip(prepared, found, samplings, strict=True):
        own[number] = _told(answered, sampling, trained.pipeline.tokenizer), ""
    parts: list[dict[int, tuple[Answered, str]]] = [{} for _ in range(replicas.size())]
    dist.all_gather_object(parts, own, group=replicas)
    everything = {number: result for part in parts for number, result in part.items()}
    return [everything[number] for number in range(len(questions))]


def _told(found: GeneratedAnswer, sampling: Sampling, tokenizer: Tokenizer) -> Answered:
    """Fields of a line of the outputs."""
    if sampling.logprobs is None:
        return {"answer": found.text}
    return {"answer": found.text, "logprobs": token_logprobs(found, tokenizer)}
