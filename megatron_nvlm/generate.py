"""Entry point: answers of a trained run to a question, to a file of questions, or in a conversation on the terminal.

`torchrun --nproc-per-node N -m megatron_nvlm.generate --run-dir DIR [section.key=value ...]` and one of
`[--image FILE ...] --question TEXT`, `--inputs FILE.jsonl --outputs FILE.jsonl`, `--chat` (docs/inference.md).
"""

import argparse
import sys
from pathlib import Path

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.answer_files import answer_file
from megatron_nvlm.inference.answers import answer
from megatron_nvlm.inference.chat import chat
from megatron_nvlm.inference.questions import Conversation, read_picture
from megatron_nvlm.inference.sampling import Sampling
from megatron_nvlm.option_types import LaunchedParser, natural_float, natural_int, positive_int, share
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
    add("--max-new-tokens", type=positive_int, default=64, help="most tokens of an answer (default 64)")
    add("--temperature", type=natural_float, default=0.0, help="0 (the default) takes the likeliest token, more draws")
    add("--top-p", type=share, default=1.0, help="draw from the likeliest tokens that make up this share (default 1)")
    add(
        "--seed",
        type=natural_int,
        default=0,
        help="of the draws; a question's answer does not depend on its neighbours",
    )
    add("overrides", nargs="*", help="section.key=value")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """What argparse cannot refuse."""
    if (options.inputs is None) != (options.outputs is None):
        raise UserError("--inputs and --outputs belong together; give both or neither")
    if options.inputs is not None and options.image:
        raise UserError("--image does not go with --inputs, whose lines name their own images; leave it out")
    for name in ("batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line; prints answers or writes them. Status 1 if lines of a file could not be answered."""
    options = make_parser().parse_intermixed_args(arguments)
    check_options(options)
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    images = [read_picture(path) for path in options.image]
    if options.inputs is not None and not options.inputs.is_file():
        raise UserError(f"there is no file {options.inputs}; correct --inputs")
    trained = open_trained_run(options.run_dir, options.checkpoint, options.overrides)
    failed = 0
    if options.chat:
        chat(trained, images, options.max_new_tokens, sampling)
    elif options.inputs is not None:
        settings = (options.batch_size, options.max_new_tokens, sampling)
        failed = answer_file(trained, options.inputs, options.outputs, *settings)
    else:
        sample = trained.pipeline.prepare(Conversation().ask(options.question, images), open_answer=True)
        say(answer(trained, [sample], options.max_new_tokens, sampling)[0])
    stop_groups()
    if failed:
        say(f'{failed} lines could not be answered; {options.outputs} has the reasons under "error"')
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
