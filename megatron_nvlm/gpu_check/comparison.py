"""A fake step beside what the dry run says of the same rank and the same micro-batches."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_nvlm.estimate.dry_run import GIB, DryRun, quick_dry_run
from megatron_nvlm.estimate.ranks import build_whole
from megatron_nvlm.estimate.sample import SampleShape
from megatron_nvlm.estimate.step_time import Hardware
from megatron_nvlm.gpu_check.fake_step import FakeStep, FakeStepInput
from megatron_nvlm.runs.plan import make_plan
from megatron_nvlm.runs.resolve import ResolvedRun


@dataclass(frozen=True)
class Row:
    """One number, in bytes."""

    what: str
    fake: int
    estimate: int

    @property
    def apart(self) -> float:
        """Of the estimate, relative to the fake step's number; 0 where both are 0."""
        return (self.estimate - self.fake) / self.fake if self.fake else float(self.estimate != 0)


def estimate(run: ResolvedRun, sample: SampleShape, micro_batches: int) -> DryRun:
    """The dry run of as many micro-batches; in a process that is in no process group."""
    plan = make_plan(run, sample)
    whole = build_whole(plan.model, plan.dtype, plan.trainable)
    batch = plan.micro_batch_size * plan.replicas * micro_batches
    return quick_dry_run(replace(plan, global_batch_size=batch), Hardware(), "local", whole)


def compare(fake: FakeStep, wanted: FakeStepInput, dry: DryRun) -> list[Row]:
    """Memory and messages of the rank, in the order of a report."""
    stage = dry.stages[wanted.stage]
    rows = [
        Row("weights", fake.weight_bytes, stage.state.weights),
        Row("gradients", fake.gradient_bytes, stage.state.gradients),
        Row("optimizer", fake.optimizer_bytes, stage.state.optimizer),
        Row("activations and working memory", fake.peak_bytes - fake.state_bytes, stage.activations + stage.working),
        Row("peak", fake.peak_bytes, stage.total_bytes),
    ]
    sent = {group: sum(one.bytes_sent for one in fake.messages if one.group == group) for group in _estimated(dry)}
    return rows + [Row(f"sent, {group} parallel", sent[group], told) for group, told in _estimated(dry).items()]


def _estimated(dry: DryRun) -> dict[str, int]:
    """Bytes that the slowest stage sends in a step, as the predicted seconds have them."""
    hardware, parallelism = Hardware(), dry.plan.parallelism
    tensor, stages = parallelism.tensor_model_parallel_size, parallelism.pipeline_model_parallel_size
    everyone = tensor * stages * dry.plan.replicas
    return {
        "tensor": round(dry.time.tensor_parallel_messages * hardware.bytes_per_second(tensor)),
        "pipeline": round(dry.time.pipeline_messages * hardware.bytes_per_second(everyone)),
        "data": round(dry.time.data_parallel_messages * hardware.bytes_per_second(tensor * dry.plan.replicas)),
    }


def render(fake: FakeStep, wanted: FakeStepInput, rows: Sequence[Row]) -> str:
    """The report of one rank."""
    lines = [
        f"{wanted.config}, stage {wanted.stage} of a world of {wanted.world_size}: {wanted.micro_batches} micro-batches of "
        f"{fake.tokens} decoder tokens, {fake.context_tokens} context tokens, {fake.tiles} tiles; {fake.operations} "
        f"operations on the device ({sum(fake.triton_launches.values())} of them Triton kernels of ours)",
        "no operation mixes devices",
        f"waits for the device: {fake.total_waits} in the step",
    ]
    lines += [f"  {count} x {what}: {place}" for what, places in fake.waits.items() for place, count in places.items()]
    lines.append(f"{'GiB':34}{'fake step':>12}{'dry run':>12}{'apart':>10}")
    lines += [
        f"{row.what:34}{row.fake / GIB:12.3f}{row.estimate / GIB:12.3f}{row.apart:10.1%}"
        for row in rows
        if row.fake or row.estimate
    ]
    lines.append("messages of the step:")
    lines += [
        f"  {one.operation} over {one.ranks} ranks ({one.group}): {one.count}, {one.bytes_sent / GIB:.3f} GiB sent"
        for one in fake.messages
    ]
    return "\n".join(lines)


def to_plain(fake: FakeStep, wanted: FakeStepInput, rows: Sequence[Row]) -> dict[str, Any]:
    """The numbers, for JSON."""
    return {
        "input": asdict(wanted),
        "step": asdict(fake),
        "waits_in_all": fake.total_waits,
        "rows": [{**asdict(row), "apart": row.apart} for row in rows],
    }
