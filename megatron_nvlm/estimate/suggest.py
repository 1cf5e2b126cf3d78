"""Layouts for a number of GPUs: all that the rules allow, counted, those that fit, best predicted throughput first."""

import dataclasses
from collections.abc import Callable, Iterator

from megatron_nvlm.errors import UserError
from megatron_nvlm.estimate.dry_run import DryRun, DryRunInput, quick_dry_run
from megatron_nvlm.estimate.ranks import build_whole
from megatron_nvlm.estimate.step_time import Hardware
from megatron_nvlm.models.config import ModelConfig
from megatron_nvlm.models.parallelism import ParallelismConfig

RECOMPUTE_KINDS = ("none", "selective", "full")
MOST_CHUNKS = 2
"""Virtual stages that are tried."""


def candidates(plan: DryRunInput, hardware: Hardware) -> Iterator[tuple[ModelConfig, ParallelismConfig]]:
    """Tensor parallel within a node, any pipeline, one or two chunks a stage, each kind of recomputation.

    Sequence parallelism goes with tensor parallelism (it costs nothing and saves memory). Chunks and pipelines that the
    model cannot be cut into are left to the rules.
    """
    for tensor in _divisors(min(hardware.gpus_per_node, plan.world_size)):
        for pipeline in _divisors(plan.world_size // tensor):
            for chunks in range(1, MOST_CHUNKS + 1 if pipeline > 1 else 2):
                for recompute in RECOMPUTE_KINDS:
                    model = dataclasses.replace(plan.model.config, recompute=recompute)
                    yield model, _partition(plan, tensor, pipeline, chunks)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _partition(plan: DryRunInput, tensor: int, pipeline: int, chunks: int) -> ParallelismConfig:
    context = 0
    if chunks > 1 and plan.sizes.variant.needs_cross_attention:
        pictures = plan.sample.regular_tiles + 1
        context = plan.micro_batch_size * pictures * (plan.sizes.vision.tokens_per_tile + plan.sample.tag_tokens)
    return dataclasses.replace(
        plan.parallelism,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=tensor > 1,
        virtual_pipeline_model_parallel_size=chunks,
        pipeline_layout=None,
        payload_vision_tokens=context,
    )


def suggest(
    plan: DryRunInput,
    hardware: Hardware,
    backend: str,
    plan_of: Callable[[ModelConfig, ParallelismConfig], DryRunInput],
) -> tuple[list[DryRun], int]:
    """Layouts that fit, fastest first; and how many the rules allow.

    Args:
        plan: of the run as it is; sizes, batch and what trains stay.
        plan_of: the plan of a layout; raises UserError for one that the rules refuse.
    """
    whole = build_whole(plan.model, plan.dtype, plan.trainable)
    allowed = []
    for model, parallelism in candidates(plan, hardware):
        try:
            candidate = plan_of(model, parallelism)
        except UserError:
            continue
        allowed.append(quick_dry_run(candidate, hardware, backend, whole))
    fitting = [run for run in allowed if run.free_gib(hardware) >= 0]
    return sorted(fitting, key=lambda run: run.samples_per_second, reverse=True), len(allowed)


def render_suggestions(runs: list[DryRun], allowed: int, hardware: Hardware, most: int = 20) -> str:
    """A table of the first `most`."""
    lines = [
        f"{len(runs)} of {allowed} allowed layouts fit {hardware.memory_gib:g} GiB less {hardware.reserve_gib:g}; "
        f"predicted at {hardware.utilisation:.0%} utilisation while computing, an assumption:",
        f"{'tensor':>6}{'pipeline':>9}{'chunks':>7}{'data':>5}{'recompute':>10}{'samples/s':>10}{'s/step':>8}"
        f"{'bubble':>8}{'GiB free':>9}",
    ]
    for run in runs[:most]:
        parallelism = run.plan.parallelism
        lines.append(
            f"{parallelism.tensor_model_parallel_size:>6}{parallelism.pipeline_model_parallel_size:>9}"
            f"{parallelism.virtual_pipeline_model_parallel_size:>7}{run.plan.replicas:>5}{run.plan.model.config.recompute:>10}"
            f"{run.samples_per_second:>10.1f}{run.time.total:>8.2f}{run.bubble:>8.1%}{run.free_gib(hardware):>9.1f}"
        )
    return "\n".join(lines)
