"""What is known of a run without running it: ranks, ownership, memory, FLOPs, bubble, predicted time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_nvlm.accounting.flops import (
    Flops,
    ModelFlops,
    ModelSizes,
    Work,
    by_component,
    count_flops,
    count_work,
    sizes_of,
    whole_model,
)
from megatron_nvlm.errors import UserError
from megatron_nvlm.estimate.activation_bytes import ActivationModel, ChunkSizes, micro_batches_in_flight
from megatron_nvlm.estimate.ownership import check_ownership
from megatron_nvlm.estimate.ranks import BuiltRank, build_rank, build_ranks, build_whole
from megatron_nvlm.estimate.sample import SampleShape, make_micro_batch
from megatron_nvlm.estimate.state_bytes import StateBytes, largest_state_bytes
from megatron_nvlm.estimate.step_time import Hardware, StepTime, StepWork, bubble_fraction, predict_step
from megatron_nvlm.models.config import ResolvedModel
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.precision import Precision

GIB = 2**30


@dataclass(frozen=True)
class DryRunInput:
    """What a dry run needs to know of a run."""

    model: ResolvedModel
    """Its backend is replaced by local, which has the same parameters."""
    parallelism: ParallelismConfig
    world_size: int
    precision: Precision
    trainable: tuple[str, ...]
    micro_batch_size: int
    global_batch_size: int
    sample: SampleShape
    payload_tokens: int = 0
    """Rows of each message between virtual stages; 0 where a message is as long as its micro-batch."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.precision.parameter_dtype

    @property
    def replicas(self) -> int:
        """Data-parallel size."""
        return self.parallelism.data_parallel_size(self.world_size)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each replica."""
        return self.global_batch_size // (self.micro_batch_size * self.replicas)

    @property
    def sizes(self) -> ModelSizes:
        """Sizes of the model, as counting needs them."""
        return sizes_of(self.model, self.parallelism)


@dataclass(frozen=True)
class StageReport:
    """A pipeline stage, on the rank that holds most."""

    stage: int
    layers: tuple[int, ...]
    """Their numbers, from 0."""
    cross_attention_layers: tuple[int, ...]
    has_encoder: bool
    parameters: int
    trainable_parameters: int
    state: StateBytes
    activations: int
    """Of all micro-batches in flight."""
    working: int
    payload_bytes: int
    """That one micro-batch sends to the next stage, from each rank; as much comes back."""

    @property
    def total_bytes(self) -> int:
        """State, activations and working memory at the worst moment."""
        return self.state.total + self.activations + self.working


@dataclass(frozen=True)
class DryRun:
    """The result."""

    plan: DryRunInput
    backend: str
    """The backend whose activations are estimated."""
    stages: tuple[StageReport, ...]
    problems: tuple[str, ...]
    """Of ownership; empty if every parameter is owned exactly once per replica."""
    whole_parameters: dict[str, int]
    """Parameters of the whole model, by part."""
    ranks_built: int
    work: Work
    """Of one micro-batch."""
    flops: ModelFlops
    """Of one micro-batch."""
    time: StepTime

    @property
    def bubble(self) -> float:
        """Share of a step."""
        parallelism = self.plan.parallelism
        return bubble_fraction(
            parallelism.pipeline_model_parallel_size,
            parallelism.virtual_pipeline_model_parallel_size,
            self.plan.micro_batches,
        )

    @property
    def micro_batches_of_all_replicas(self) -> int:
        """Micro-batches of all replicas in one step."""
        return self.plan.micro_batches * self.plan.replicas

    @property
    def decoder_flops(self) -> Flops:
        """Decoder FLOPs of one micro-batch: all layers, cross-attention, output layer."""
        parts = by_component(self.plan.sizes, self.flops)
        return parts["language_model"] + parts["cross_attention"]

    @property
    def step_flops(self) -> Flops:
        """FLOPs of one step on all replicas."""
        return whole_model(self.plan.sizes, self.flops).times(self.micro_batches_of_all_replicas)

    @property
    def samples_per_second(self) -> float:
        """Predicted throughput."""
        return self.plan.global_batch_size / self.time.total

    def model_flops_utilisation(self, samples_per_second: float, hardware: Hardware) -> float:
        """Share of all GPUs' peak that this rate of samples amounts to, recomputation not counted."""
        per_sample = self.step_flops.model / self.plan.global_batch_size
        return per_sample * samples_per_second / (self.plan.world_size * hardware.peak_tflops * 1e12)

    def free_gib(self, hardware: Hardware) -> float:
        """Free memory of the fullest rank; negative if the run does not fit."""
        fullest = max(stage.total_bytes for stage in self.stages)
        return hardware.memory_gib - hardware.reserve_gib - fullest / GIB


def dry_run(plan: DryRunInput, hardware: Hardware, backend: str, whole: BuiltRank | None = None) -> DryRun:
    """Build and count.

    Args:
        whole: the whole model, if it has been built already.
    """
    ranks = build_ranks(plan.model, plan.parallelism, plan.world_size, plan.dtype, plan.trainable)
    whole = whole or build_whole(plan.model, plan.dtype, plan.trainable)
    problems = check_ownership(whole, ranks, _on_every_stage(plan), plan.model.language.tied_embeddings)
    return _count(plan, hardware, backend, ranks, problems, whole)


def _on_every_stage(plan: DryRunInput) -> tuple[str, ...]:
    return ("vision_model",) if plan.parallelism.vision_placement == "replicated" else ()


def quick_dry_run(plan: DryRunInput, hardware: Hardware, backend: str, whole: BuiltRank) -> DryRun:
    """Count with one tensor-parallel rank of each stage, in a world of one replica; ownership is not checked."""
    stages = plan.parallelism.pipeline_model_parallel_size
    world = stages * plan.parallelism.tensor_model_parallel_size
    ranks = [
        build_rank(plan.model, plan.parallelism, world, stage, 0, plan.dtype, plan.trainable) for stage in range(stages)
    ]
    return _count(plan, hardware, backend, ranks, [], whole)


def _count(
    plan: DryRunInput,
    hardware: Hardware,
    backend: str,
    ranks: Sequence[BuiltRank],
    problems: Sequence[str],
    whole: BuiltRank,
) -> DryRun:
    sizes = plan.sizes
    tokens_per_tile = sizes.vision.tokens_per_tile
    micro_batch = make_micro_batch(plan.sample, sizes.variant, tokens_per_tile, plan.micro_batch_size)
    work = count_work(micro_batch, tokens_per_tile)
    flops = count_flops(sizes, work, plan.trainable)
    by_stage = [
        [rank for rank in ranks if rank.stage == stage]
        for stage in range(plan.parallelism.pipeline_model_parallel_size)
    ]
    chunks = [[_chunk_sizes(names) for names in _names_by_chunk(group[0])] for group in by_stage]
    stages = tuple(_stage_report(plan, backend, work, group) for group in by_stage)
    step = StepWork(
        flops,
        work,
        sizes,
        chunks,
        plan.parallelism,
        plan.micro_batches,
        plan.replicas,
        gradient_bytes=max(stage.state.gradients for stage in stages),
        weight_bytes=plan.dtype.itemsize * max(stage.trainable_parameters for stage in stages),
        payload_bytes=max(stage.payload_bytes for stage in stages),
    )
    time = predict_step(step, hardware)
    counts: dict[str, int] = {}
    for parameter in whole.parameters:
        counts[parameter.part] = counts.get(parameter.part, 0) + parameter.numel
    return DryRun(plan, backend, stages, tuple(problems), counts, len(ranks), work, flops, time)


def _names_by_chunk(rank: BuiltRank) -> list[list[str]]:
    return [[parameter.name for parameter in chunk] for chunk in rank.chunks]


def _layer_numbers(names: Sequence[str], within: str = "") -> tuple[int, ...]:
    start = "language_model.decoder.layers."
    numbers = {int(name[len(start) :].split(".")[0]) for name in names if name.startswith(start) and within in name}
    return tuple(sorted(numbers))


def _chunk_sizes(names: Sequence[str]) -> ChunkSizes:
    return ChunkSizes(
        layers=len(_layer_numbers(names)),
        cross_attention_layers=len(_layer_numbers(names, ".cross_attention.")),
        has_encoder=any(name.startswith("vision_model.") for name in names),
        has_projector=any(name.startswith("vision_projection.") for name in names),
        # Beside the output layer, which has no parameters of its own where it is the embedding
        has_output=any(name.startswith("language_model.decoder.final_layernorm.") for name in names),
    )


def _stage_report(plan: DryRunInput, backend: str, work: Work, ranks: Sequence[BuiltRank]) -> StageReport:
    parallelism = plan.parallelism
    fullest = max(ranks, key=lambda rank: sum(parameter.numel for parameter in rank.parameters))
    stage, stages = fullest.stage, parallelism.pipeline_model_parallel_size
    model = ActivationModel(plan.sizes, parallelism, plan.dtype, plan.trainable, backend, plan.micro_batches)
    names = _names_by_chunk(fullest)
    counted = [model.chunk(_chunk_sizes(chunk), work) for chunk in names]
    in_flight = micro_batches_in_flight(stage, stages, len(names), plan.micro_batches)
    whole = [name for chunk in names for name in chunk]
    return StageReport(
        stage=stage,
        layers=_layer_numbers(whole),
        cross_attention_layers=_layer_numbers(whole, ".cross_attention."),
        has_encoder=any(name.startswith("vision_model.") for name in whole),
        parameters=sum(parameter.numel for parameter in fullest.parameters),
        trainable_parameters=sum(parameter.numel for parameter in fullest.parameters if parameter.trains),
        state=largest_state_bytes(fullest, plan.precision, plan.replicas, parallelism.use_distributed_optimizer),
        activations=round(in_flight * sum(chunk.kept for chunk in counted)),
        working=max(chunk.working for chunk in counted),
        payload_bytes=_payload_bytes(plan, work) if stage < stages - 1 or len(names) > 1 else 0,
    )


def _payload_bytes(plan: DryRunInput, work: Work) -> int:
    """Decoder tokens and, for X and H, the context, padded as training pads them; a shard of both under SP."""
    parallelism = plan.parallelism
    multiple = parallelism.token_multiple
    context = max(work.num_context_tokens, 1) if plan.sizes.variant.needs_cross_attention else 0
    num_tokens = -(-work.num_tokens // multiple) * multiple + -(-context // multiple) * multiple
    if plan.payload_tokens:
        if num_tokens > plan.payload_tokens:
            raise UserError(
                f"a micro-batch sends {num_tokens} tokens between stages and virtual pipeline stages send "
                f"{plan.payload_tokens}; "
                "raise parallelism.payload_vision_tokens to "
                f"{parallelism.payload_vision_tokens + num_tokens - plan.payload_tokens}"
            )
        num_tokens = plan.payload_tokens
    return num_tokens // multiple * plan.sizes.language.hidden_size * plan.dtype.itemsize
