"""What a run would need and do, on a laptop: `python -m tools.dry_run --config FILE --world-size N [key=value ...]`.

Builds every distinct rank without memory and prints layers, parameters and bytes per rank, FLOPs, bubble, and whether it
fits. `--suggest` lists layouts that fit instead. See docs/performance.md for what the numbers mean.
Exit status: 0; 1 if the run does not fit, or its parameters are not each owned once; 2 for a mistake, in one sentence.
"""

import argparse
import json
import sys
from dataclasses import fields, replace

import megatron_nvlm.quiet  # noqa: F401
from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.config.load import load_run
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.errors import UserError
from megatron_nvlm.estimate.dry_run import DryRunInput, dry_run
from megatron_nvlm.estimate.report import render, to_plain
from megatron_nvlm.estimate.sample import SampleShape
from megatron_nvlm.estimate.step_time import Hardware
from megatron_nvlm.estimate.suggest import render_suggestions, suggest
from megatron_nvlm.models.config import ModelConfig
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.option_types import (
    natural_float,
    natural_int,
    positive_float,
    positive_int,
    rank_count,
    tile_count,
    token_count,
)
from megatron_nvlm.runs.entry import user_errors_end_the_process
from megatron_nvlm.runs.plan import TAG_TOKENS, make_plan
from megatron_nvlm.runs.resolve import look_up, resolve_run

HARDWARE_OPTIONS = {
    "memory_gib": "--gpu-memory-gib",
    "reserve_gib": "--reserve-gib",
    "peak_tflops": "--peak-tflops",
    "utilisation": "--utilisation",
    "gpus_per_node": "--gpus-per-node",
    "node_gigabytes_per_second": "--node-gigabytes-per-second",
    "network_gigabytes_per_second": "--network-gigabytes-per-second",
}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron_nvlm.commands.dry_run", description="What a run would need and do.")
    parser.add_argument("--config", required=True, help="run file, see configs/")
    parser.add_argument("--world-size", type=rank_count, required=True, help="ranks (GPUs)")
    parser.add_argument("--suggest", action="store_true", help="list the layouts that fit, fastest first")
    parser.add_argument("--json", action="store_true", help="print numbers as one JSON object")
    parser.add_argument(
        "--sample-tokens", "--sample-rows", type=token_count, help="decoder tokens of a sample (data.sequence_length)"
    )
    parser.add_argument("--tiles", type=tile_count, help="tiles of its image, thumbnail not counted (tiling.max_tiles)")
    parser.add_argument(
        "--tag-tokens", type=natural_int, default=TAG_TOKENS, help="tokens of a tile's tag (%(default)s)"
    )
    parser.add_argument("--measured", type=positive_float, help="samples/s of a real run: print their utilisation")
    for field in fields(Hardware):
        parser.add_argument(
            HARDWARE_OPTIONS[field.name],
            dest=field.name,
            type=positive_int if field.type is int else natural_float,
            default=field.default,
            help="(%(default)s)",
        )
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    return parser.parse_args(arguments)


def _check_options(options: argparse.Namespace) -> None:
    if options.world_size < 1:
        raise UserError(f"--world-size is {options.world_size}; it must be at least 1")
    for name, option in HARDWARE_OPTIONS.items():
        if getattr(options, name) <= 0 and name != "reserve_gib":
            raise UserError(f"{option} is {getattr(options, name)}; it must be more than 0")


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _options(arguments)
    _check_options(options)
    run = load_run(options.config, options.overrides)
    hardware = Hardware(**{field.name: getattr(options, field.name) for field in fields(Hardware)})
    sample = SampleShape(
        num_tokens=options.sample_tokens or run.data.sequence_length,
        regular_tiles=run.tiling.max_tiles if options.tiles is None else options.tiles,
        tag_tokens=0 if run.tiling.tag_format == "none" else options.tag_tokens,
    )
    if options.suggest:
        _suggest(run, options, sample, hardware)
        return
    resolved = resolve_run(run, options.world_size)
    result = dry_run(make_plan(resolved, sample), hardware, run.model.backend)
    if options.json:
        print(json.dumps(to_plain(result, hardware, options.measured)))
    else:
        print(render(result, hardware, options.measured))
    if result.problems or result.free_gib(hardware) < 0:
        sys.exit(1)


def _suggest(run: RunConfig, options: argparse.Namespace, sample: SampleShape, hardware: Hardware) -> None:
    def plan_of(model: ModelConfig, parallelism: ParallelismConfig) -> DryRunInput:
        other = replace(run, model=model, parallelism=parallelism)
        return make_plan(resolve_run(other, options.world_size), sample)

    as_it_is = make_plan(look_up(run, options.world_size), sample)
    runs, allowed = suggest(as_it_is, hardware, run.model.backend, plan_of)
    if options.json:
        print(json.dumps([to_plain(one, hardware) for one in runs]))
    else:
        print(render_suggestions(runs, allowed, hardware))
    if not runs:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
