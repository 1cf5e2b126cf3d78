"""A dry run as text, and as plain values for other programs."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megatron_nvlm.accounting.flops import Flops, by_component
from megatron_nvlm.estimate.dry_run import GIB, DryRun, StageReport
from megatron_nvlm.estimate.step_time import Hardware


def render(run: DryRun, hardware: Hardware, measured: float | None = None) -> str:
    """The whole report. `measured` is in samples per second, of a real run of the same plan."""
    sections = [_layout(run), _ownership(run), _stages(run), _memory(run, hardware), _flops(run), _time(run, hardware)]
    if measured is not None:
        sections.append(_measured(run, hardware, measured))
    return "\n\n".join("\n".join(section) for section in sections)


def _layout(run: DryRun) -> Iterator[str]:
    plan, sample = run.plan, run.plan.sample
    parallelism, config = plan.parallelism, plan.model.config
    yield (
        f"NVLM-{plan.model.variant.name.upper()}: {config.language}, {config.vision}, on {plan.world_size} ranks: "
        f"tensor {parallelism.tensor_model_parallel_size}, pipeline {parallelism.pipeline_model_parallel_size}"
        f"{_chunks(run)}, data {plan.replicas}"
        f"{', sequence parallel' if parallelism.sequence_parallel else ''}"
        f"{', distributed optimizer' if parallelism.use_distributed_optimizer else ''}, recompute {config.recompute}"
    )
    yield f"trains: {', '.join(part for part in plan.trainable if part in run.whole_parameters)}; the rest is frozen"
    yield (
        f"step: {plan.global_batch_size} samples, {plan.micro_batches} micro-batches of {plan.micro_batch_size} on each "
        "replica"
    )
    yield (
        f"sample: {sample.num_tokens} decoder tokens, "
        f"{run.work.num_context_tokens // plan.micro_batch_size} context tokens, "
        f"{run.work.tiles // plan.micro_batch_size} tiles (tags of {sample.tag_tokens} tokens)"
    )


def _chunks(run: DryRun) -> str:
    chunks = run.plan.parallelism.virtual_pipeline_model_parallel_size
    return f" in {chunks} chunks each" if chunks > 1 else ""


def _ownership(run: DryRun) -> Iterator[str]:
    total = sum(run.whole_parameters.values())
    parts = ", ".join(f"{part} {count:,}" for part, count in run.whole_parameters.items())
    yield f"parameters: {total:,} ({parts})"
    if run.problems:
        yield f"OWNERSHIP IS WRONG, {len(run.problems)} problems:"
        yield from (f"  {problem}" for problem in run.problems[:10])
    else:
        yield f"each is owned exactly once per replica ({run.ranks_built} distinct ranks built)"
        if run.plan.parallelism.vision_placement == "replicated":
            yield "but for the encoder, of which every rank has a copy, as parallelism.vision_placement says"


_COLUMNS = ("stage", "layers", "cross-attention layers", "parameters", "weights", "gradients", "optimizer")
_MORE_COLUMNS = ("activations", "working", "total GiB", "payload MiB")


def _stages(run: DryRun) -> Iterator[str]:
    yield "per rank of a stage (the fullest one), GiB:"
    rows = [list(_COLUMNS + _MORE_COLUMNS), *(_row(stage) for stage in run.stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    if any(stage.payload_bytes for stage in run.stages):
        yield "payload: what a micro-batch sends to the next stage from each rank; its gradient comes back"


def _row(stage: StageReport) -> list[str]:
    state = stage.state
    amounts = (state.weights, state.gradients, state.optimizer, stage.activations, stage.working, stage.total_bytes)
    return [
        f"{stage.stage}{' + encoder' if stage.has_encoder else ''}",
        f"{len(stage.layers)} ({ranges(stage.layers)})",
        f"{len(stage.cross_attention_layers)} ({ranges(stage.cross_attention_layers)})",
        f"{stage.parameters:,}",
        *(f"{amount / GIB:.2f}" for amount in amounts),
        f"{stage.payload_bytes / 2**20:.1f}",
    ]


def ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as `0-2,5`; nothing as `-`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in found) or "-"


def _memory(run: DryRun, hardware: Hardware) -> Iterator[str]:
    free = run.free_gib(hardware)
    verdict = f"fits, with {free:.1f} GiB to spare" if free >= 0 else f"DOES NOT FIT: {-free:.1f} GiB too much"
    yield (
        f"memory of {hardware.memory_gib:g} GiB, {hardware.reserve_gib:g} of it reserved for CUDA, NCCL and the "
        f"allocator: {verdict}"
    )
    yield (
        f"weights, gradients and optimizer are exact; activations are estimated (backend {run.backend}). Ranks were built "
        "with the backend local, whose parameters are those of te."
    )


def _flops(run: DryRun) -> Iterator[str]:
    count = run.micro_batches_of_all_replicas
    yield "FLOPs of a step, PFLOP:"
    yield f"{'':12}{'forward':>12}{'inputs':>12}{'weights':>12}{'recompute':>12}{'needless':>12}{'model':>12}"
    for name, flops in (
        ("vision", run.flops.vision.times(count)),
        ("projector", run.flops.projector.times(count)),
        ("decoder", run.decoder_flops.times(count)),
        ("all", run.step_flops),
    ):
        yield f"{name:12}" + "".join(f"{amount / 1e15:12.3f}" for amount in _amounts(flops))
    yield (
        "inputs, weights: gradients of these; needless: backward below the first layer that needs it; model: without the "
        "last two. Real rows, tiles and attended pairs only."
    )


def _amounts(flops: Flops) -> tuple[int, ...]:
    return flops.forward, flops.input_gradient, flops.weight_gradient, flops.recompute, flops.needless, flops.model


def _time(run: DryRun, hardware: Hardware) -> Iterator[str]:
    time = run.time
    yield f"pipeline bubble: {run.bubble:.1%} of a step if all stages are equally fast"
    yield (
        f"predicted at {hardware.utilisation:.0%} of {hardware.peak_tflops:g} TFLOP/s while computing (an assumption): "
        f"{time.total:.2f} s a step, {run.samples_per_second:.1f} samples/s "
        f"({run.samples_per_second / run.plan.world_size:.3f} a GPU), "
        f"MFU {run.model_flops_utilisation(run.samples_per_second, hardware):.1%}"
    )
    yield "  " + ", ".join(f"{name.replace('_', ' ')} {seconds:.2f} s" for name, seconds in asdict(time).items())
    name, share = time.bound
    parts = by_component(run.plan.sizes, run.flops)
    executed = sum(part.executed for part in parts.values())
    shares = sorted(((part.executed / executed, component) for component, part in parts.items()), reverse=True)
    yield (
        f"bound by {name.replace('_', ' ')}, {share:.0%} of a step; operations: "
        + ", ".join(f"{component} {amount:.0%}" for amount, component in shares if amount)
    )


def _measured(run: DryRun, hardware: Hardware, measured: float) -> Iterator[str]:
    utilisation = run.model_flops_utilisation(measured, hardware)
    again = run.step_flops.executed / run.step_flops.model
    yield (
        f"measured {measured:g} samples/s: {utilisation * hardware.peak_tflops:.0f} TFLOP/s a GPU, MFU {utilisation:.1%} "
        f"({utilisation * again:.1%} with recompute {run.plan.model.config.recompute})"
    )


def to_plain(run: DryRun, hardware: Hardware, measured: float | None = None) -> dict[str, Any]:
    """The numbers of the report, for JSON."""
    utilisation = None if measured is None else run.model_flops_utilisation(measured, hardware)
    return {
        "world_size": run.plan.world_size,
        "parallelism": asdict(run.plan.parallelism),
        "recompute": run.plan.model.config.recompute,
        "ownership_problems": list(run.problems),
        "parameters": run.whole_parameters,
        "ranks_built": run.ranks_built,
        "stages": [{**asdict(stage), "total_bytes": stage.total_bytes} for stage in run.stages],
        "work_per_micro_batch": asdict(run.work),
        "flops_per_step": {
            name: asdict(flops.times(run.micro_batches_of_all_replicas))
            for name, flops in (
                ("vision", run.flops.vision),
                ("projector", run.flops.projector),
                ("decoder", run.decoder_flops),
            )
        },
        "model_flops_per_step": run.step_flops.model,
        "bubble": run.bubble,
        "seconds_per_step": asdict(run.time) | {"total": run.time.total},
        "samples_per_second": run.samples_per_second,
        "samples_per_second_per_gpu": run.samples_per_second / run.plan.world_size,
        "bound_by": run.time.bound[0],
        "measured_mfu": utilisation,
        "fits": run.free_gib(hardware) >= 0,
        "free_gib": run.free_gib(hardware),
    }
