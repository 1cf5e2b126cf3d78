"""Predicted step time from stated rates, for ranking layouts; nothing is fitted to a measurement.

A stage's time for a micro-batch is its operations (recomputation included) over its ranks' peak times one stated
utilisation, with the tiles of the rank that encodes most, plus its tensor-parallel messages, plus what it sends to the
next stage and back. The pipeline costs (micro-batches + (stages - 1) / chunks) times the slowest stage's. At the end
gradients are reduced and weights gathered over the data-parallel ranks. Nothing is assumed to overlap; loading, optimizer
and kernel launches are left out.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_nvlm.accounting.flops import ModelFlops, ModelSizes, Work
from megatron_nvlm.accounting.peaks import H100_SXM, peak_tflops_of
from megatron_nvlm.estimate.activation_bytes import ChunkSizes
from megatron_nvlm.models.parallelism import ParallelismConfig


@dataclass(frozen=True)
class Hardware:
    """Rates of a GPU and of what connects GPUs. The defaults are an H100 SXM's data sheet and one 400 Gbit/s port a GPU."""

    memory_gib: float = 80
    reserve_gib: float = 4
    """Of the memory, for CUDA, NCCL and the allocator; a guess."""
    peak_tflops: float = peak_tflops_of(H100_SXM) or 0.0
    """Dense bf16."""
    utilisation: float = 0.4
    """Share of the peak that matrix products reach while they run; a guess, the same for all parts."""
    gpus_per_node: int = 8
    node_gigabytes_per_second: float = 450
    """Between GPUs of a node, one way."""
    network_gigabytes_per_second: float = 50
    """Between nodes, a GPU's share, one way."""

    def flops_per_second(self) -> float:
        """What a GPU computes."""
        return self.peak_tflops * 1e12 * self.utilisation

    def bytes_per_second(self, ranks: int) -> float:
        """What a GPU sends to ranks within this distance."""
        inside = ranks <= self.gpus_per_node
        return 1e9 * (self.node_gigabytes_per_second if inside else self.network_gigabytes_per_second)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they go to on the slowest stage."""

    encoding_ahead: float
    """Tiles before the pipeline starts; 0 where the first stage encodes them in the pipeline."""
    computing: float
    """Operations of all micro-batches, recomputation included."""
    tensor_parallel_messages: float
    """Inside layers."""
    pipeline_messages: float
    """Between stages."""
    bubble: float
    """Waiting for the pipeline to fill and drain."""
    data_parallel_messages: float
    """Gradients and weights over the replicas."""

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(asdict(self).values())

    @property
    def bound(self) -> tuple[str, float]:
        """The part that takes longest, and its share of the step."""
        name, seconds = max(asdict(self).items(), key=lambda part: part[1])
        return name, seconds / self.total


def bubble_fraction(stages: int, chunks: int, micro_batches: int) -> float:
    """Share of a step in which a stage waits, if all are equally fast."""
    waiting = (stages - 1) / chunks
    return waiting / (micro_batches + waiting)


@dataclass(frozen=True)
class StepWork:
    """What a step has to compute and to send."""

    flops: ModelFlops
    """Of one micro-batch."""
    work: Work
    """Of one micro-batch."""
    sizes: ModelSizes
    stages: Sequence[Sequence[ChunkSizes]]
    """The chunks of each stage."""
    parallelism: ParallelismConfig
    micro_batches: int
    """Of a step, on a replica."""
    replicas: int
    """Data-parallel size."""
    gradient_bytes: int
    """Of what trains on the fullest rank."""
    weight_bytes: int
    """Of what trains on the fullest rank."""
    payload_bytes: int
    """Of one micro-batch between stages, on one rank."""


def predict_step(step: StepWork, hardware: Hardware) -> StepTime:
    """Seconds of a step."""
    tensor = step.parallelism.tensor_model_parallel_size
    ahead = step.parallelism.vision_placement == "replicated"
    encoding = _encoding_operations(step.flops, step.work, step.parallelism, step.micro_batches)
    times = []
    for number, chunks in enumerate(step.stages):
        operations = sum(_chunk_operations(step.flops, chunk) for chunk in chunks) / tensor
        if number == 0 and not ahead:
            operations += encoding
        compute = operations / hardware.flops_per_second()
        messages = sum(_chunk_messages(step.work, step.sizes, chunk, step.parallelism) for chunk in chunks)
        neighbours = (number > 0) + (number < len(step.stages) - 1)
        network = hardware.bytes_per_second(tensor * len(step.stages) * step.replicas)
        between = neighbours * len(chunks) * step.payload_bytes / network
        times.append((compute, messages / hardware.bytes_per_second(tensor), between))
    compute, tensor_parallel, between = max(times, key=sum)
    waiting = (len(step.stages) - 1) / step.parallelism.virtual_pipeline_model_parallel_size
    # Core orders ranks tensor first, then data, then pipeline parallel. In a ring each rank sends (N - 1) / N
    # of the whole, N replicas, once to reduce and once to gather.
    data_parallel = (step.replicas - 1) / step.replicas * (step.gradient_bytes + step.weight_bytes)
    if not step.parallelism.use_distributed_optimizer:
        data_parallel = (step.replicas - 1) / step.replicas * 2 * step.gradient_bytes
    return StepTime(
        encoding_ahead=encoding / hardware.flops_per_second() if ahead else 0.0,
        computing=step.micro_batches * compute,
        tensor_parallel_messages=step.micro_batches * tensor_parallel,
        pipeline_messages=step.micro_batches * between,
        bubble=waiting * (compute + tensor_parallel + between),
        data_parallel_messages=data_parallel / hardware.bytes_per_second(tensor * step.replicas),
    )


def _encoding_operations(flops: ModelFlops, work: Work, parallelism: ParallelismConfig, micro_batches: int) -> float:
    """Operations of the rank with most tiles: for a micro-batch, or for the whole step if tiles are encoded ahead."""
    if not work.tiles:
        return 0.0
    tensor = parallelism.tensor_model_parallel_size
    if parallelism.vision_placement == "tensor_parallel":
        return flops.vision.executed / tensor
    tiles, ranks = work.tiles, tensor
    if parallelism.vision_placement == "replicated":
        tiles, ranks = work.tiles * micro_batches, tensor * parallelism.pipeline_model_parallel_size
    return -(-tiles // ranks) * flops.vision.executed / work.tiles


def _chunk_operations(flops: ModelFlops, chunk: ChunkSizes) -> int:
    """Operations of a chunk over all its ranks, without the encoder."""
    operations = flops.decoder(chunk.layers, chunk.cross_attention_layers).executed
    if chunk.has_projector:
        operations += flops.projector.executed
    if chunk.has_output:
        operations += flops.output_layer.executed
    return operations


def _chunk_messages(work: Work, sizes: ModelSizes, chunk: ChunkSizes, parallelism: ParallelismConfig) -> float:
    """Bytes that a rank sends to its tensor-parallel peers for a micro-batch, forward and backward.

    Each half of a layer gathers its rows before and reduces them after (an all-reduce without sequence parallelism is
    both at once), in the forward pass, in the backward pass and in what is recomputed; under sequence parallelism rows are
    gathered once more for the gradients of weights.
    """
    ranks = parallelism.tensor_model_parallel_size
    passes = 4 + (1 if parallelism.sequence_parallel else 0) + (2 if sizes.recompute == "full" else 0)
    width = 2 * sizes.language.hidden_size * (ranks - 1) / ranks  # bytes of a row in bf16, as a ring sends it
    rows = 2 * chunk.layers * work.num_tokens + chunk.cross_attention_layers * (
        work.num_tokens + work.num_context_tokens / 2
    )
    if chunk.has_output:
        rows += work.num_tokens
    sent = passes * rows * width
    if chunk.has_projector:
        features = 2 * work.tiles * sizes.vision.patches_per_tile * sizes.vision.hidden_size * (ranks - 1) / ranks
        # Gathered once; a tensor-parallel encoder reduces its rows twice a layer instead, an all-reduce each.
        sent += features * (4 * sizes.vision.num_layers if parallelism.vision_placement == "tensor_parallel" else 1)
    return sent
