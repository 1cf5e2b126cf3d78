"""Micro-batches of a step, as a pure function of the data's position; workers prepare ahead and change nothing.

A bad sample is skipped: its place of the order stays empty, so every other sample still comes exactly once an epoch, and
ranks need not agree on anything, since each sees the same bytes. (Taking the next sample in its place, as other loaders
do, would show that one twice.) Its row is shorter; a row without any sample is one token that is no target. Ranks that
share the tiles of a step do agree (sharing_loader.py).
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_nvlm.data.collate import build_micro_batch
from megatron_nvlm.data.loading.fetch import BadRecord, SampleRequest
from megatron_nvlm.data.loading.in_place import InPlace, Preparers
from megatron_nvlm.data.loading.worker_pool import WorkerPool
from megatron_nvlm.data.order.batches import BatchPlan, DataPosition, PackedBatchPlan, PlannedStep, UnpackedBatchPlan
from megatron_nvlm.data.order.lengths import LengthCounter, TextTokenCounter, check_counts
from megatron_nvlm.data.order.order import WINDOW_SHARDS, BlendedOrder
from megatron_nvlm.data.order.packing import PackingConfig
from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.data.shards.remote import CacheConfig
from megatron_nvlm.errors import UserError
from megatron_nvlm.sequence.micro_batch import MicroBatch

logger = logging.getLogger(__name__)

PREFETCH_SAMPLES = 32
_TILES_OF_A_SAMPLE = 8
"""Shared memory is made for so many tiles of each sample that is prepared ahead; larger samples use others' room."""


@dataclass(frozen=True)
class DataSource:
    """A set of shards and its share in the blend."""

    path: str
    """A folder, or an address (s3://, http://)."""
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Section `data` of a run."""

    train: list[DataSource]
    """Sets to train on, with their weights."""
    tokenizer: str
    """Path of a tokenizer.json."""
    sequence_length: int
    """Most decoder tokens of a sample, and of a pack; longer samples are bad samples of the kind too_long."""
    valid: str | None = None
    """A set to answer questions from when training ends."""
    template: str = "chatml"
    system: str | None = "Answer the questions."
    """System turn of samples that have none; null for none."""
    seed: int = 1234
    """Of the order of samples."""
    shuffle_window_shards: int = WINDOW_SHARDS
    """Samples of so many shards are shuffled among each other; fewer read more in sequence, more mix better."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    num_workers: int = 0
    """Processes of each rank that read and decode ahead; 0 does it in place."""
    prefetch_samples: int = PREFETCH_SAMPLES
    """Samples that workers prepare ahead on each rank; where ranks share the tiles of a step, memory for so many."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    max_bad_fraction: float = 0.01
    """Share of bad samples among those consumed past which the run stops."""
    ledger: bool = False
    """Write the keys of each step's samples to ledger.jsonl in the run's folder, for audits."""


class MicroBatchLoader:
    """The training data of one rank. With workers, close it when done.

    Args:
        sets: opened shards, in the order of the configuration. order: over the same sets.
        micro_batch_size: samples of a row; with packing it must be 1 and counts rows.
        data_parallel: (rank, size).
        token_multiple, with_pixels: as in `pack`; without pixels, tiles are counted and not kept.
        pin_memory: put tensors where a GPU copies them from without waiting.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        order: BlendedOrder,
        pipeline: SamplePipeline,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel: tuple[int, int],
        token_multiple: int = 1,
        with_pixels: bool = True,
        num_workers: int = 0,
        *,
        packing: PackingConfig | None = None,
        prefetch_samples: int = PREFETCH_SAMPLES,
        pin_memory: bool = False,
        cache: CacheConfig | None = None,
    ) -> None:
        self.rank, self.size = data_parallel
        if global_batch_size % (micro_batch_size * self.size):
            raise UserError(
                f"training.global_batch_size {global_batch_size} is no multiple of training.micro_batch_size "
                f"{micro_batch_size} x {self.size} data-parallel ranks"
            )
        self.sets, self.order, self.pipeline = sets, order, pipeline
        self.token_multiple, self.with_pixels, self.pin_memory = token_multiple, with_pixels, pin_memory
        self._counter = LengthCounter(
            pipeline.tokenizer,
            pipeline.tiling,
            pipeline.variant,
            pipeline.tokens_per_tile,
            pipeline.sequence_length,
            pipeline.template,
        )
        self.packing = packing if packing is not None and packing.enabled else None
        self.plan: BatchPlan = UnpackedBatchPlan(micro_batch_size, global_batch_size)
        if self.packing is not None:
            self.plan = self._make_packed_batch_plan(self.packing, micro_batch_size, global_batch_size)
        self.bad: list[BadRecord] = []
        """Bad samples of the step that was drawn last, on this rank."""
        self.prefetch_samples = prefetch_samples
        self.preparers: Preparers = InPlace(sets, pipeline)
        """Who reads and decodes."""
        if num_workers:
            tile_bytes = 3 * pipeline.tiling.tile_size**2
            room = prefetch_samples * _TILES_OF_A_SAMPLE * tile_bytes if with_pixels else 0
            self.preparers = WorkerPool(sets, pipeline, num_workers, room, with_pixels, cache)
        self._ahead: deque[tuple[int, ...]] = deque()
        """Rows that were asked for, as the preparers' numbers."""
        self._micro_batches: Iterator[tuple[int, ...]] = iter(())
        self._expected: tuple[DataPosition, int] | None = None

    def _make_packed_batch_plan(
        self, packing: PackingConfig, micro_batch_size: int, global_batch_size: int
    ) -> PackedBatchPlan:
        if micro_batch_size != 1:
            raise UserError(
                f"with data.packing.enabled a micro-batch is one pack; set training.micro_batch_size=1, "
                f"not {micro_batch_size}, and let training.global_batch_size count rows"
            )
        wanted = TextTokenCounter(self.pipeline.tokenizer, self.pipeline.template, self.pipeline.system).description
        for shards in self.sets:
            check_counts(shards.index, shards.location, wanted)
        return PackedBatchPlan(
            packing, self.order, [shards.index for shards in self.sets], self._counter, global_batch_size
        )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step on this rank."""
        return self.plan.micro_batches_per_step // self.size

    def after(self, position: DataPosition) -> DataPosition:
        """Where the step after this one begins."""
        return self.plan.step(position).after

    def step(self, position: DataPosition) -> Iterator[MicroBatch]:
        """The micro-batches of this rank for the step that begins at `position`.

        Raises:
            UserError: a shard cannot be reached or a worker died.
        """
        if self._expected != (position, 0):
            self._start_at(position)
        self.bad = []
        for drawn in range(1, self.num_micro_batches + 1):
            # Noted before the row is drawn, so that a step left half-way is seen as such by the next.
            self._expected = (position, drawn)
            yield self._next()
        self._expected = (self.after(position), 0)

    def close(self) -> None:
        """End the workers."""
        self.preparers.close()

    def _start_at(self, position: DataPosition) -> None:
        self.preparers.forget([ticket for tickets in self._ahead for ticket in tickets])
        self._ahead.clear()
        self._micro_batches = self._micro_batches_from(position)

    def _micro_batches_from(self, position: DataPosition) -> Iterator[tuple[int, ...]]:
        """This rank's rows, without end."""
        while True:
            step = self.plan.step(position)
            yield from self.own_micro_batches(step)
            position = step.after

    def own_micro_batches(self, step: PlannedStep) -> tuple[tuple[int, ...], ...]:
        """This rank's rows of a step, as places of the order."""
        return step.micro_batches[self.rank :: self.size]

    def _next(self) -> MicroBatch:
        waiting = sum(len(row) for row in self._ahead)
        while not self._ahead or (self.preparers.works_ahead and waiting < self.prefetch_samples):
            tickets = self._ask(next(self._micro_batches))
            self._ahead.append(tickets)
            waiting += max(1, len(tickets))
        tickets = self._ahead.popleft()
        samples = self._keep(self.preparers.collect(ticket) for ticket in tickets)
        micro_batch = self.build(samples, keep_tiles=not self.preparers.works_ahead)
        for ticket in tickets:  # only now, since tiles were copied straight from the shared memory
            self.preparers.release(ticket)
        return micro_batch

    def build(self, samples: Sequence[PreparedSample], keep_tiles: bool = True, first_tile: int = 0) -> MicroBatch:
        """A row of samples; see `build_micro_batch`."""
        return build_micro_batch(
            samples, self.pipeline, self.token_multiple, self.with_pixels, self.pin_memory, keep_tiles, first_tile
        )

    def _ask(self, places: tuple[int, ...]) -> tuple[int, ...]:
        """The preparers' numbers of the row's samples."""
        tickets = []
        micro_batch_room = 0
        for place in places:
            sample = self.order(place)
            index = self.sets[sample.dataset].index
            room = self._counter.most_tiles(index, sample.number) if self.with_pixels else 0
            micro_batch_room += room
            if micro_batch_room > self.preparers.most_tiles:
                room = 0  # the whole row must have room at once; what has none comes through the pipe
            tickets.append(self.preparers.submit(self.request(place), room))
        return tuple(tickets)

    def request(self, place: int, part: tuple[int, int] | None = None) -> SampleRequest:
        """The sample at a place of the order; with packing it must be as long as the pack has room for."""
        sample = self.order(place)
        if self.packing is None:
            return SampleRequest(sample, part=part)
        sizes = self._counter.sizes(self.sets[sample.dataset].index, [sample.number])
        return SampleRequest(sample, int(sizes.tokens[0]), part)

    def _keep(self, results: Iterator[PreparedSample | BadRecord]) -> list[PreparedSample]:
        good = []
        for result in results:
            if isinstance(result, BadRecord):
                self.skip(result)
            else:
                good.append(result)
        return good

    def skip(self, bad: BadRecord) -> None:
        """Count and name a bad sample."""
        self.bad.append(bad)
        logger.warning("skipped sample %s of %s: %s", bad.key or bad.number, bad.shard, bad.reason)
