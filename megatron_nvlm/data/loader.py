"""Micro-batches of a step, as a pure function of `consumed_samples`; threads decode ahead and change nothing.

A bad sample is replaced by the next number of its set, a rule that every rank follows alone; it is counted by kind and
source and named in the log.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_nvlm.data.order import WINDOW_SHARDS, BlendedOrder, SampleId
from megatron_nvlm.data.shards import ShardSet
from megatron_nvlm.data.stages import BadSample, PreparedSample, SamplePipeline
from megatron_nvlm.errors import UserError
from megatron_nvlm.sequence.micro_batch import MicroBatch, pack

logger = logging.getLogger(__name__)

MOST_REPLACEMENTS = 20
"""Bad samples in a row after which the set itself is taken for broken."""


@dataclass(frozen=True)
class DataSource:
    """A set of shards and its share in the blend."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Section `data` of a run."""

    train: list[DataSource]
    """Sets to train on, with their weights."""
    tokenizer: str
    """Path of a tokenizer.json."""
    sequence_length: int
    """Most decoder rows of a sample; longer ones are bad samples of the kind too_long."""
    valid: str | None = None
    """A set to answer questions from when training ends."""
    template: str = "chatml"
    system: str | None = "Answer the questions."
    """System turn of samples that have none; null for none."""
    seed: int = 1234
    """Of the order of samples."""
    shuffle_window_shards: int = WINDOW_SHARDS
    """Samples of so many shards are shuffled among each other; fewer read more in sequence, more mix better."""
    num_workers: int = 0
    """Threads that read and decode ahead; 0 does it in place."""
    max_bad_fraction: float = 0.01
    """Share of bad samples among those consumed past which the run stops."""


@dataclass
class BadSampleCounts:
    """Bad samples of this rank so far, by kind and source."""

    counts: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.counts.values())


class MicroBatchLoader:
    """The training data of one rank.

    Args:
        sets: opened shards, in the order of the configuration. order: over the same sets.
        row_multiple, with_context: as in `pack`.
        micro_batch_size: samples of a row. data_parallel: (rank, size).
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        order: BlendedOrder,
        pipeline: SamplePipeline,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel: tuple[int, int],
        row_multiple: int = 1,
        with_pixels: bool = True,
        num_workers: int = 0,
    ) -> None:
        rank, size = data_parallel
        if global_batch_size % (micro_batch_size * size):
            raise UserError(
                f"training.global_batch_size {global_batch_size} is no multiple of training.micro_batch_size "
                f"{micro_batch_size} x {size} data-parallel ranks"
            )
        self.sets, self.order, self.pipeline = sets, order, pipeline
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.rank, self.size = rank, size
        self.row_multiple, self.with_pixels = row_multiple, with_pixels
        self.bad = BadSampleCounts()
        self._threads = ThreadPoolExecutor(num_workers) if num_workers else None
        self._ahead: dict[int, Future[PreparedSample]] = {}

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step on this rank."""
        return self.global_batch_size // (self.micro_batch_size * self.size)

    def step(self, consumed_samples: int) -> Iterator[MicroBatch]:
        """The micro-batches of this rank for the step that begins at `consumed_samples`."""
        self._look_ahead(consumed_samples)
        for micro_batch in range(self.num_micro_batches):
            yield self._build([self._sample(i) for i in self._positions(consumed_samples, micro_batch)])

    def _positions(self, consumed_samples: int, micro_batch: int) -> range:
        first = consumed_samples + (micro_batch * self.size + self.rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def _look_ahead(self, consumed_samples: int) -> None:
        """Start on this step and the next; forget what another position left behind."""
        if self._threads is None:
            return
        wanted = [
            i
            for step in (0, 1)
            for micro_batch in range(self.num_micro_batches)
            for i in self._positions(consumed_samples + step * self.global_batch_size, micro_batch)
        ]
        self._ahead = {i: future for i, future in self._ahead.items() if i in set(wanted)}
        for i in wanted:
            if i not in self._ahead:
                self._ahead[i] = self._threads.submit(self._prepare, self.order(i))

    def _sample(self, i: int) -> PreparedSample:
        future = self._ahead.pop(i, None)
        return future.result() if future is not None else self._prepare(self.order(i))

    def _prepare(self, sample: SampleId) -> PreparedSample:
        shards = self.sets[sample.dataset]
        number = sample.number
        for _ in range(MOST_REPLACEMENTS):
            try:
                try:
                    raw = shards.read(number)
                except UserError as error:
                    raise BadSample("record", str(error)) from error
                try:
                    return self.pipeline.prepare(raw)
                except BadSample as error:
                    raise BadSample(error.kind, f"sample {raw.key}: {error}") from error
            except BadSample as error:
                self.bad.counts[f"{error.kind}/{shards.folder.name}"] += 1
                logger.warning("skipped number %d of %s: %s", number, shards.folder, error)
                number = (number + 1) % len(shards)
        raise UserError(
            f"{MOST_REPLACEMENTS} bad samples in a row in {shards.folder}, up to number {number}; "
            "see the warnings above, and build the shards again"
        )

    def _build(self, samples: Sequence[PreparedSample]) -> MicroBatch:
        return build_micro_batch(samples, self.pipeline, self.row_multiple, self.with_pixels)


def build_micro_batch(
    samples: Sequence[PreparedSample], pipeline: SamplePipeline, row_multiple: int = 1, with_pixels: bool = True
) -> MicroBatch:
    """Pack prepared samples into one ragged row."""
    tiles = np.concatenate([sample.tiles for sample in samples])
    return pack(
        [sample.rows for sample in samples],
        torch.from_numpy(tiles if with_pixels else tiles[:0]),
        [sample.key for sample in samples],
        pipeline.tokens_per_tile,
        row_multiple,
        pipeline.variant.needs_cross_attention,
    )
