"""A run as the dry run takes it."""

from dataclasses import replace

from megatron_nvlm.estimate.dry_run import DryRunInput
from megatron_nvlm.estimate.sample import SampleShape
from megatron_nvlm.runs.resolve import ResolvedRun

TAG_TOKENS = 5
"""The release's scripts give each tile 5 rows beside its 256."""


def make_plan(run: ResolvedRun, sample: SampleShape) -> DryRunInput:
    """The run, for the dry run."""
    config = run.config
    return DryRunInput(
        model=replace(run.model, config=replace(config.model, backend="local")),
        parallelism=config.parallelism,
        world_size=run.world_size,
        precision=run.precision,
        trainable=run.trainable,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        sample=sample,
        payload_tokens=run.payload_tokens,
    )
