"""What can be known of a run on GPUs without one: `python -m tools.gpu_check --config FILE --world-size N [key=value ...]`.

One rank's training step runs on fake CUDA tensors: a mix of devices is an error, each wait of the host for the device is
listed with its line, and memory and messages stand beside the dry run's estimates. `--kernels` compiles the Triton kernels
for GPUs that are not there instead. See docs/performance.md for what is real in it and what is not.
Exit status: 0; 1 if the host waits more than once in a step, or a kernel does not fit; 2 for a mistake, in one sentence.
"""

import argparse
import json
import sys

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.config.load import load_run
from megatron_nvlm.errors import UserError
from megatron_nvlm.estimate.sample import SampleShape
from megatron_nvlm.gpu_check.comparison import compare, estimate, render, to_plain
from megatron_nvlm.gpu_check.fake_step import FakeStepInput, run_fake_steps
from megatron_nvlm.gpu_check.kernels import CAPABILITIES, compile_all
from megatron_nvlm.option_types import natural_int, positive_int, rank_count, tile_count, token_count
from megatron_nvlm.runs.entry import user_errors_end_the_process
from megatron_nvlm.runs.plan import TAG_TOKENS
from megatron_nvlm.runs.resolve import ResolvedRun, resolve_run

MOST_WAITS = 1
"""Of the host in a step: one, behind everything, to know what the step gave."""
BACKEND = "model.backend=local"
"""The fake step's: Transformer Engine's kernels cannot be stood in for."""


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron_nvlm.commands.gpu_check", description="A GPU's step, without a GPU."
    )
    parser.add_argument("--config", help="run file, or the name of one of configs/")
    parser.add_argument("--world-size", type=rank_count, help="ranks (GPUs)")
    parser.add_argument("--stage", type=natural_int, help="pipeline stage, from 0 (all of them)")
    parser.add_argument("--micro-batches", type=positive_int, help="of the step (2, or as many as pipeline stages)")
    parser.add_argument("--sample-tokens", type=token_count, help="decoder tokens of a sample (data.sequence_length)")
    parser.add_argument("--tiles", type=tile_count, help="tiles of its image, thumbnail not counted (tiling.max_tiles)")
    parser.add_argument(
        "--kernels", action="store_true", help="compile the Triton kernels instead, for all of our GPUs"
    )
    parser.add_argument("--json", action="store_true", help="print numbers as JSON")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    if not options.kernels and (options.config is None or options.world_size is None):
        parser.error("a step needs --config and --world-size; the alternative is --kernels")
    return options


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _options(arguments)
    if not (_kernels(options) if options.kernels else _steps(options)):
        sys.exit(1)


def _steps(options: argparse.Namespace) -> bool:
    """Print the report of each stage; returns whether no step waits more often than it may."""
    overrides = (*options.overrides, BACKEND)
    run = resolve_run(load_run(options.config, list(overrides)), options.world_size)
    stages = run.config.parallelism.pipeline_model_parallel_size
    if options.stage is not None and options.stage >= stages:
        raise UserError(f"--stage is {options.stage} and the run has {stages} pipeline stages, counted from 0")
    micro_batches = options.micro_batches or max(2, stages)
    wanted = [
        FakeStepInput(
            *(options.config, overrides, options.world_size, stage, micro_batches, options.sample_tokens, options.tiles)
        )
        for stage in (range(stages) if options.stage is None else [options.stage])
    ]
    fakes = run_fake_steps(wanted)
    dry = estimate(run, _sample(run, options), micro_batches)
    found = [(fake, one, compare(fake, one, dry)) for fake, one in zip(fakes, wanted, strict=True)]
    if options.json:
        print(json.dumps([to_plain(*one) for one in found]))
    else:
        print("\n\n".join(render(*one) for one in found))
    return all(fake.total_waits <= MOST_WAITS for fake in fakes)


def _sample(run: ResolvedRun, options: argparse.Namespace) -> SampleShape:
    config = run.config
    return SampleShape(
        num_tokens=options.sample_tokens or config.data.sequence_length,
        regular_tiles=config.tiling.max_tiles if options.tiles is None else options.tiles,
        tag_tokens=0 if config.tiling.tag_format == "none" else TAG_TOKENS,
    )


def _kernels(options: argparse.Namespace) -> bool:
    """Print the table of kernels; returns whether all of them fit."""
    found = [kernel for capability in CAPABILITIES for kernel in compile_all(capability)]
    if options.json:
        print(json.dumps(found))
        return all(kernel["fits"] for kernel in found)
    print(f"{'kernel':36}{'GPU':>8}{'registers':>11}{'spilled':>9}{'shared KiB':>12}  tensor cores")
    for kernel in found:
        verdict = "" if kernel["fits"] else "  DOES NOT FIT"
        print(
            f"{kernel['name']:36}{'sm_' + str(kernel['capability']):>8}{kernel['registers']:11}{kernel['spilled_bytes']:9}"
            f"{kernel['shared_bytes'] / 1024:12.1f}  {kernel['tensor_cores'] or '-'}{verdict}"
        )
    return all(kernel["fits"] for kernel in found)


if __name__ == "__main__":
    sys.exit(main())
