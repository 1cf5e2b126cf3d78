"""Runs a model on saved inputs and writes what it computes, to be compared with another implementation.

  python -m tools.score --checkpoint CKPT | --hf DIR  --inputs FILE --out FILE
      [--tensor-parallel N --pipeline-parallel M] [--gradients] [--precision fp32|bf16|fp64]

Inputs (safetensors; CASE is any word): `CASE.input_ids` [b, r], and as there are `CASE.attention_mask` [b, r],
`CASE.labels` [b, r] (the token's own, -100 for none), `CASE.pixel_values` [t, 3, S, S] normalised, `CASE.image_flags` [t];
`img_context_token_id` [1], the id that stands where a vision token goes. For X and H also what the exported folder's
processor gives: `CASE.num_tiles`, `CASE.vision_index`, `CASE.context_input_ids`, `CASE.context_vision_index`,
`CASE.context_intervals`.
Outputs: `CASE.logits` [b, r, vocabulary] (zeros at padding), `CASE.loss` [1] with labels, with tiles `CASE.vit_features`
[t, patches, v], `CASE.pixel_shuffled`, `CASE.mlp1_out` [t, tokens per tile, h]; with --gradients `CASE.grad.NAME` of the
loss for every weight under its Hugging Face name. With N x M over 1 it starts N x M processes itself.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from torch import Tensor

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.errors import UserError
from megatron_nvlm.evaluation.score_cases import read_cases
from megatron_nvlm.evaluation.score_model import open_scored, score_case, write_outputs
from megatron_nvlm.option_types import local_path, positive_int
from megatron_nvlm.parallel.groups import stop_groups
from megatron_nvlm.runs.entry import global_rank, say, user_errors_end_the_process


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="CKPT", help="a run's folder or a checkpoint below its checkpoints/")
    add("--hf", type=local_path, metavar="DIR", help="a whole NVLM folder")
    add("--inputs", type=local_path, required=True, metavar="FILE")
    add("--out", type=Path, required=True, metavar="FILE")
    add("--tensor-parallel", type=positive_int, default=1, metavar="N")
    add("--pipeline-parallel", type=positive_int, default=1, metavar="M")
    add("--gradients", action="store_true")
    add("--precision", choices=("fp32", "bf16", "fp64"), default="fp32")
    return parser


@user_errors_end_the_process
def score(arguments: list[str] | None = None) -> None:
    """One rank's work."""
    options = _parser().parse_args(arguments)
    if (options.checkpoint is None) == (options.hf is None):
        raise UserError("name what to run: either --checkpoint or --hf")
    cases = read_cases(options.inputs)
    scored = open_scored(
        options.checkpoint, options.hf, options.tensor_parallel, options.pipeline_parallel, options.precision
    )
    outputs: dict[str, Tensor] = {}
    for case in cases:
        found = score_case(scored, case, options.gradients)
        outputs |= {f"{case.name}.{name}": tensor for name, tensor in found.items()}
    if global_rank() == 0:
        write_outputs(options.out, outputs)
    say(f"{options.out}: {len(cases)} cases, {len(outputs)} tensors")
    stop_groups()


def main(arguments: list[str] | None = None) -> int:
    """Command line: this process is the only rank, one of several, or starts them."""
    options = _parser().parse_args(arguments)
    ranks = options.tensor_parallel * options.pipeline_parallel
    if ranks <= 1 or "WORLD_SIZE" in os.environ:
        return score(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "megatron_nvlm.commands.score",
    ]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return 2 if subprocess.run([sys.executable, *launcher, *given], env=environment).returncode else 0


if __name__ == "__main__":
    sys.exit(main())
