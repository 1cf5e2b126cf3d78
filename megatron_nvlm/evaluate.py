"""Entry point: a trained run on held-out shards.

`torchrun --nproc-per-node N -m megatron_nvlm.evaluate --run-dir DIR [section.key=value ...]` answers the last question
of each sample of `data.valid` and writes DIR/evaluation.json.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.data.prepare import PreparedSample
from megatron_nvlm.data.shards.read import RawSample, ShardSet
from megatron_nvlm.errors import UserError
from megatron_nvlm.evaluation.accuracy import VIEWS, Answer, accuracy_table
from megatron_nvlm.inference.answers import answer
from megatron_nvlm.inference.sampling import Sampling
from megatron_nvlm.option_types import LaunchedParser, positive_int
from megatron_nvlm.parallel.groups import get_groups, stop_groups
from megatron_nvlm.runs.entry import say, user_errors_end_the_process
from megatron_nvlm.runs.restore import TrainedRun, open_trained_run
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.text.conversation import read_turns


def answer_all(trained: TrainedRun, shards: ShardSet, batch_size: int, max_new_tokens: int) -> list[Answer]:
    """Every sample under every view, shared out over the data-parallel replicas; all ranks return all answers."""
    replicas = get_groups().dp
    numbers = range(replicas.rank(), len(shards), replicas.size())
    sampling = Sampling(max_new_tokens=max_new_tokens)
    own: list[Answer] = []
    for first in range(0, len(numbers), batch_size):
        raws = [shards.read(number) for number in numbers[first : first + batch_size]]
        samples = [_prepare(trained, raw, shards.name) for raw in raws]
        truths = [read_turns(raw.record)[-1].text for raw in raws]
        for view, look in VIEWS.items():
            texts = answer(trained, [look(sample) for sample in samples], sampling)
            own += [
                Answer(sample.key, view, sample.source, truth, text)
                for sample, truth, text in zip(samples, truths, texts, strict=True)
            ]
    gathered: list[list[Answer]] = [[] for _ in range(replicas.size())]
    dist.all_gather_object(gathered, own, group=replicas)
    return [answer for part in gathered for answer in part]


def _prepare(trained: TrainedRun, raw: RawSample, name: str) -> PreparedSample:
    try:
        return trained.pipeline.prepare(raw, open_answer=True)
    except UserError as error:
        raise UserError(f"the sample {raw.key} of {name}: {error}") from error


def evaluate(options: argparse.Namespace) -> None:
    """Open, answer, write, say."""
    run_dir: Path = options.run_dir
    trained = open_trained_run(run_dir, options.checkpoint, options.overrides)
    if trained.run.data.valid is None:
        raise UserError("the run names no held-out shards; set data.valid to their folder")
    valid = ShardSet(trained.run.data.valid, cache=trained.run.data.cache)
    answers = answer_all(trained, valid, options.batch_size, options.max_new_tokens)
    table = accuracy_table(answers, options.count)
    if dist.get_rank() == 0:
        record = {
            "step": trained.progress.step,
            "accuracy": table,
            "answers": [dataclasses.asdict(answer) for answer in answers],
        }
        RunDir(run_dir).evaluation.write_text(json.dumps(record, indent=1) + "\n")
    for view, shares in table.items():
        say(f"characters right, {view:15s}" + "".join(f"  {name} {share:6.1%}" for name, share in shares.items()))
    say(f"answers are in {RunDir(run_dir).evaluation}")
    stop_groups()


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = LaunchedParser(prog="megatron_nvlm.evaluate", description="A trained run on held-out shards.")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the training")
    parser.add_argument("--checkpoint", type=Path, help="a folder below checkpoints/; the newest if not given")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="samples answered at once")
    parser.add_argument("--max-new-tokens", type=positive_int, default=16)
    parser.add_argument("--count", default=r"\S", help="pattern of the characters of an answer that count")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    evaluate(options)


if __name__ == "__main__":
    sys.exit(main())
