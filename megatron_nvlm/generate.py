"""Entry point: answers of a trained run to a question, to a file of questions, or in a conversation on the terminal.

`torchrun --nproc-per-node N -m megatron_nvlm.generate --run-dir DIR [section.key=value ...]` and one of
`[--image FILE ...] --question TEXT`, `--inputs FILE.jsonl --outputs FILE.jsonl`, `--chat` (docs/inference.md).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.answer_files import answer_file
from megatron_nvlm.inference.answers import answer
from megatron_nvlm.inference.chat import chat
from megatron_nvlm.inference.questions import Conversation, read_picture
from megatron_nvlm.inference.sampling import GREEDY, Sampling
from megatron_nvlm.option_types import (
    LaunchedParser,
    finite_float,
    natural_float,
    natural_int,
    positive_float,
    positive_int,
    share,
)
from megatron_nvlm.parallel.groups import stop_groups
from megatron_nvlm.runs.entry import say, user_errors_end_the_process
from megatron_nvlm.runs.restore import open_trained_run


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = LaunchedParser(prog="megatron_nvlm.generate", description="Ask a trained run about images.")
    add = parser.add_argument
    add("--run-dir", type=Path, required=True, help="folder of the training")
    add("--checkpoint", type=Path, help="a folder below checkpoints/; the newest if not given")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--question", help="one question; <image> in it is the place of an image, else images come first")
    what.add_argument(
        "--inputs", type=Path, metavar="FILE.jsonl", help='lines of {"id", "question", "images": [paths]}'
    )
    what.add_argument("--chat", action="store_true", help="questions from the terminal")
    add("--image", type=Path, action="append", default=[], help="a picture file; may be repeated")
    add(
        "--outputs",
        type=Path,
        metavar="FILE.jsonl",
        help="answers to --inputs; what is there already is not asked again",
    )
    add("--batch-size", type=positive_int, default=8, help="questions of --inputs answered at once (default 8)")
    add_sampling_options(parser)
    add("overrides", nargs="*", help="section.key=value")
    return parser


SAMPLING_OPTIONS: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (positive_int, "most tokens of an answer"),
    "min_new_tokens": (natural_int, "the end token is not chosen before"),
    "temperature": (natural_float, "0 takes the likeliest token, more draws"),
    "top_k": (natural_int, "draw from this many likeliest tokens; 0 from all"),
    "top_p": (share, "draw from the likeliest tokens that make up this share"),
    "seed": (natural_int, "of the draws; a question's answer does not depend on its neighbours"),
    "repetition_penalty": (positive_float, "over 1 makes tokens of prompt and answer less likely"),
    "logprobs": (natural_int, "write log-probabilities to --outputs, with this many alternatives for each token"),
    "beams": (positive_int, "answers followed at once in beam search"),
    "length_penalty": (finite_float, "beam search divides scores by the length to this power"),
}
"""Fields of `Sampling`, each with the kind of its number and its help."""


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options for every field of `Sampling`."""
    for name, (kind, told) in SAMPLING_OPTIONS.items():
        default = getattr(GREEDY, name)
        shown = "" if default is None else f" (default {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=told + shown)
    parser.add_argument("--stop", action="append", default=[], help="an answer ends before this text; may be repeated")
    parser.add_argument(
        "--early-stopping", action="store_true", help="end beam search as soon as enough answers are complete"
    )


def read_sampling(options: argparse.Namespace) -> Sampling:
    """What `add_sampling_options` made of the command line."""
    numbers = {name: getattr(options, name) for name in SAMPLING_OPTIONS}
    return Sampling(**numbers, stop=tuple(options.stop), early_stopping=options.early_stopping)


def check_options(options: argparse.Namespace) -> None:
    """What argparse cannot refuse."""
    if (options.inputs is None) != (options.outputs is None):
        raise UserError("--inputs and --outputs belong together; give both or neither")
    if options.inputs is not None and options.image:
        raise UserError("--image does not go with --inputs, whose lines name their own images; leave it out")
    if options.inputs is None and options.logprobs is not None:
        raise UserError("--logprobs are written to --outputs; give --inputs and --outputs, or leave it out")


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line; prints answers or writes them. Status 1 if lines of a file could not be answered."""
    options = make_parser().parse_intermixed_args(arguments)
    check_options(options)
    sampling = read_sampling(options)
    images = [read_picture(path) for path in options.image]
    if options.inputs is not None and not options.inputs.is_file():
        raise UserError(f"there is no file {options.inputs}; correct --inputs")
    trained = open_trained_run(options.run_dir, options.checkpoint, options.overrides)
    failed = 0
    if options.chat:
        chat(trained, images, sampling)
    elif options.inputs is not None:
        failed = answer_file(trained, options.inputs, options.outputs, options.batch_size, sampling)
    else:
        sample = trained.pipeline.prepare(Conversation().ask(options.question, images), open_answer=True)
        say(answer(trained, [sample], sampling)[0])
    stop_groups()
    if failed:
        say(f'{failed} lines could not be answered; {options.outputs} has the reasons under "error"')
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
