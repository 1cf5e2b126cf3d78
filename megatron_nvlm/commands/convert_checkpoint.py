"""Weights in and out: Hugging Face folders to our checkpoints and back, looked at and compared.

  import   --hf DIR | --language-model DIR --vision-model DIR   --variant d|x|h --out CKPT [model.key=value ...]
  export   --checkpoint CKPT --out DIR [--report FILE]
  inspect  CKPT|DIR ...
  verify   A B
  tokenizer FILE --out FILE            a tokenizer.model of SentencePiece -> a tokenizer.json

Every tensor is accounted for on both sides, or nothing is written and the full list is printed. Weights pass through one
at a time. Interrupted, the same command goes on. CKPT is the folder of a run or a checkpoint below its checkpoints/.
Status: 0, 1 if `verify` finds differences, 2 for a mistake that can be fixed.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.checkpoint.tensor_source import TensorSource
from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.convert import compare
from megatron_nvlm.hf.open_weights import inspect, open_any, open_pair
from megatron_nvlm.models.weight_rows import CensusError
from megatron_nvlm.option_types import local_path, natural_int, positive_float
from megatron_nvlm.parallel.groups import stop_groups
from megatron_nvlm.runs.export_run import ADAPTERS_OF_EXPORT, export_folder
from megatron_nvlm.runs.import_folders import ImportRequest, import_folders, open_tokenizer, write_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GIGABYTE = 10**9


class Progress:
    """A bar on a terminal; elsewhere nothing but what the commands print at their end."""

    def __init__(self, source: TensorSource, what: str) -> None:
        total = sum(info.num_bytes for info in source.infos.values())
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=not sys.stderr.isatty())

    def __call__(self, num_bytes: int) -> None:
        """Count this number of bytes as done."""
        self._bar.update(num_bytes)


def parser() -> argparse.ArgumentParser:
    """The commands."""
    top = argparse.ArgumentParser(
        prog="python -m tools.convert_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="Hugging Face folders -> a checkpoint").add_argument
    add("--hf", type=local_path, metavar="DIR", help="a whole NVLM folder")
    add("--language-model", type=local_path, metavar="DIR", help="a folder of any supported family")
    add("--vision-model", type=local_path, metavar="DIR", help="an InternViT folder")
    add("--variant", choices=("d", "x", "h"), required=True)
    add("--out", type=Path, required=True, metavar="CKPT", help="a folder to make")
    add(
        "--tokenizer",
        type=local_path,
        metavar="FILE",
        help="a tokenizer.json or tokenizer.model, if the folders have none",
    )
    add("--adapters", type=local_path, metavar="DIR", help="adapters (LoRA) of the language model, as PEFT writes them")
    add("--dtype", choices=("keep", *DTYPES), default="keep", help="of the weights (default keep)")
    add("--seed", type=natural_int, default=1234, help="of new weights, as training.seed (default 1234)")
    add("overrides", nargs="*", help="model.key=value, such as model.cross_attention.interval=8")
    add = commands.add_parser("export", help="a checkpoint -> a Hugging Face folder").add_argument
    add("--checkpoint", type=Path, required=True, metavar="CKPT")
    add("--out", type=Path, required=True, metavar="DIR", help="a folder to make")
    add("--dtype", choices=("keep", *DTYPES), default="keep", help="of the weights (default keep)")
    help_ = "of a run with model.lora: weights with the adapters in them, without them, or the adapters alone for PEFT"
    add("--adapters", choices=ADAPTERS_OF_EXPORT, default="merged", help=f"{help_} (default merged)")
    help_ = "a report.json of run_benchmarks, whose scores of this checkpoint go into the model card (README.md)"
    add("--report", type=local_path, metavar="FILE", help=help_)
    add("--file-gigabytes", type=positive_float, default=5.0, help="most of a safetensors file (default 5)")
    add("overrides", nargs="*", help="section.key=value of the run, such as data.tokenizer=FILE")
    add = commands.add_parser("inspect", help="a table of parts: parameters, bytes, types").add_argument
    add("paths", nargs="+", type=local_path)
    add = commands.add_parser("verify", help="compare two of them, number by number").add_argument
    add("first", type=local_path)
    add("second", type=local_path)
    add = commands.add_parser("tokenizer", help="a tokenizer.model -> a tokenizer.json").add_argument
    add("file", type=local_path)
    add("--out", type=Path, required=True, metavar="FILE", help="a file to make")
    return top


def run(options: argparse.Namespace) -> int:
    """One command; its status."""
    if options.command == "import":
        request = ImportRequest(
            options.hf,
            options.language_model,
            options.vision_model,
            options.variant,
            options.out,
            options.tokenizer,
            DTYPES.get(options.dtype),
            options.seed,
            tuple(options.overrides),
            options.adapters,
        )
        print(import_folders(request, lambda source: Progress(source, "import")))
    elif options.command == "export":
        most_bytes = int(options.file_gigabytes * GIGABYTE)
        dtype = DTYPES.get(options.dtype)
        print(
            export_folder(
                options.checkpoint,
                options.out,
                options.overrides,
                dtype,
                most_bytes,
                lambda source: Progress(source, "export"),
                options.adapters,
                options.report,
            )
        )
    elif options.command == "inspect":
        for path in options.paths:
            print(inspect(path, open_any(path)))
    elif options.command == "tokenizer":
        write_tokenizer(options.file, options.out)
        print(f"{options.out}: {open_tokenizer(options.out).vocab_size} ids")
    else:
        return verify(options.first, options.second)
    return 0


def verify(first: Path, second: Path) -> int:
    """Compare, say what differs; 1 if anything does."""
    one, other = open_pair(first, second)
    count = 0
    for difference in compare(one, other, Progress(one, "verify")):
        print(f"{difference.name}: {difference.what}")
        count += 1
    total = len(one.infos.keys() | other.infos.keys())
    print(f"{count} of {total} tensors differ" if count else f"all {total} tensors are the same, bit for bit")
    return 1 if count else 0


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = parser().parse_args(arguments)
    try:
        status = run(options)
    except UserError as error:
        for finding in error.findings if isinstance(error, CensusError) else ():
            print(f"  {finding}", file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        status = 130
    stop_groups()
    sys.exit(status)


if __name__ == "__main__":
    main()
