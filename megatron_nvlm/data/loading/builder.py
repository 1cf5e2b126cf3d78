"""What every loader is composed of: the plan of a step, samples by their places, and micro-batches made of them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_nvlm.data.collate import build_micro_batch
from megatron_nvlm.data.config import DataConfig
from megatron_nvlm.data.loading.fetch import BadRecord, SampleRequest
from megatron_nvlm.data.loading.in_place import InPlace, Preparers
from megatron_nvlm.data.loading.worker_pool import WorkerPool
from megatron_nvlm.data.order.batches import BatchPlan, PackedBatchPlan, PlannedStep, UnpackedBatchPlan
from megatron_nvlm.data.order.lengths import LengthCounter, TextTokenCounter, check_counts
from megatron_nvlm.data.order.listed import ListedBatchPlan, ListedOrder
from megatron_nvlm.data.order.order import BlendedOrder
from megatron_nvlm.data.order.packing import PackingConfig
from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.sequence.micro_batch import MicroBatch

logger = logging.getLogger(__name__)

_TILES_OF_A_SAMPLE = 8
"""Shared memory is made for N times this many tiles, N samples prepared ahead; larger samples use others' room."""


@dataclass(frozen=True)
class OpenedData:
    """Opened shards, the order over them, and the pipeline that prepares their samples."""

    sets: Sequence[ShardSet]
    """In the order of the configuration."""
    order: BlendedOrder
    """Over the same sets."""
    pipeline: SamplePipeline


@dataclass(frozen=True)
class ListedData:
    """Opened shards whose samples are read once in a fixed order."""

    sets: Sequence[ShardSet]
    order: ListedOrder
    pipeline: SamplePipeline
    plan: ListedBatchPlan
    """Over all replicas."""


@dataclass(frozen=True)
class BatchSettings:
    """How a rank's micro-batches are made."""

    micro_batch_size: int
    """Samples of a micro-batch; with packing it must be 1 and counts packs."""
    global_batch_size: int
    """Samples, or packs, of a step over all replicas: a multiple of micro_batch_size times the replicas."""
    data_parallel: tuple[int, int] = (0, 1)
    """(rank, size)."""
    token_multiple: int = 1
    """As `pad_to_multiple` of `pack`."""
    with_pixels: bool = True
    """Without pixels, tiles are counted and not kept."""
    pin_memory: bool = False
    """Put tensors where a GPU copies them from without waiting."""


def make_counter(pipeline: SamplePipeline) -> LengthCounter:
    """Lengths of samples as this pipeline makes them."""
    return LengthCounter(
        pipeline.tokenizer,
        pipeline.tiling,
        pipeline.variant,
        pipeline.tokens_per_tile,
        pipeline.sequence_length,
        pipeline.template,
        pipeline.too_long,
    )


def check_text_counts(sets: Sequence[ShardSet], pipeline: SamplePipeline) -> None:
    """Refuse, for packing, an index that does not count tokens as this run does; UserError names it."""
    wanted = TextTokenCounter(pipeline.tokenizer, pipeline.template, pipeline.system).description
    for shards in sets:
        check_counts(shards.index, shards.location, wanted)


def make_plan(
    data: OpenedData | ListedData, packing: PackingConfig, micro_batch_size: int, global_batch_size: int
) -> BatchPlan:
    """Which samples make which step.

    Raises:
        UserError: with packing, an index that does not count tokens as this run does.
    """
    if isinstance(data, ListedData):
        return data.plan
    if not packing.enabled:
        return UnpackedBatchPlan(micro_batch_size, global_batch_size)
    pipeline = data.pipeline
    check_text_counts(data.sets, pipeline)
    indexes = [shards.index for shards in data.sets]
    return PackedBatchPlan(packing, data.order, indexes, make_counter(pipeline), global_batch_size)


class MicroBatchBuilder:
    """Samples by their places in the order, and the micro-batches of one rank.

    Raises:
        UserError: with packing, an index that does not count tokens as this run does.
        ValueError: batch sizes that do not divide (config/rules.py refuses them in a run).
    """

    def __init__(self, data: OpenedData | ListedData, batch: BatchSettings, config: DataConfig) -> None:
        self.data, self.batch, self.config = data, batch, config
        self.packs = config.packing.enabled
        rank_batch = batch.micro_batch_size * batch.data_parallel[1]
        if batch.global_batch_size % rank_batch or (self.packs and batch.micro_batch_size != 1):
            raise ValueError(f"impossible batch sizes: {batch}, packing {self.packs}")
        pipeline = data.pipeline
        self.counter = make_counter(pipeline)
        self.plan = make_plan(data, config.packing, batch.micro_batch_size, batch.global_batch_size)
        self.preparers: Preparers = InPlace(data.sets, pipeline)
        """Who reads and decodes."""
        if config.num_workers:
            tile_bytes = 3 * pipeline.tiling.tile_size**2
            room = config.prefetch_samples * _TILES_OF_A_SAMPLE * tile_bytes if batch.with_pixels else 0
            self.preparers = WorkerPool(data.sets, pipeline, config.num_workers, room, batch.with_pixels, config.cache)
        self.bad: list[BadRecord] = []
        """Bad samples of the step that was drawn last, on this rank."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step on this rank."""
        return self.plan.micro_batches_per_step // self.batch.data_parallel[1]

    def own_micro_batches(self, step: PlannedStep) -> tuple[tuple[int, ...], ...]:
        """This rank's micro-batches of a step, as places of the order."""
        rank, size = self.batch.data_parallel
        return step.micro_batches[rank::size]

    def request(self, place: int, part: tuple[int, int] | None = None) -> SampleRequest:
        """The sample at a place of the order; with packing it must be as long as its pack has room for."""
        sample = self.data.order(place)
        if not self.packs:
            return SampleRequest(sample, part=part)
        sizes = self.counter.sizes(self.data.sets[sample.dataset].index, [sample.number])
        return SampleRequest(sample, int(sizes.tokens[0]), part)

    def most_tiles(self, place: int) -> int:
        """Most tiles that the sample at a place of the order can have; 0 where pixels are not kept."""
        if not self.batch.with_pixels:
            return 0
        sample = self.data.order(place)
        return self.counter.most_tiles(self.data.sets[sample.dataset].index, sample.number)

    def build(self, samples: Sequence[PreparedSample], keep_tiles: bool = True, first_tile: int = 0) -> MicroBatch:
        """A micro-batch of samples; see `build_micro_batch`."""
        batch = self.batch
        return build_micro_batch(
            samples,
            self.data.pipeline,
            batch.token_multiple,
            batch.with_pixels,
            batch.pin_memory,
            keep_tiles,
            first_tile,
        )

    def skip(self, bad: BadRecord) -> None:
        """Count and name a bad sample."""
        self.bad.append(bad)
        logger.warning("skipped sample %s of %s: %s", bad.key or bad.number, bad.shard, bad.reason)
