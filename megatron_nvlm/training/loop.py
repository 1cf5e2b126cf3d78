"""The loop, and nothing else: step, write down, save, stop."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.checkpoint.save_load import Progress
from megatron_nvlm.data.config import DataConfig
from megatron_nvlm.data.loading.loader import Loader
from megatron_nvlm.errors import DivergedError, UserError
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.training.bad_share import is_over
from megatron_nvlm.training.faults import StopRequest
from megatron_nvlm.training.metric import MetricReducer
from megatron_nvlm.training.metrics import MetricsWriter, StepTotals, rank_metrics, step_totals
from megatron_nvlm.training.optimizer import OptimizerConfig, learning_rates
from megatron_nvlm.training.sample_files import SampleWriter
from megatron_nvlm.training.step import run_step
from megatron_nvlm.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingConfig:
    """Section `training` of a run."""

    micro_batch_size: int
    """Samples of one ragged sequence."""
    global_batch_size: int
    """Samples of a step, over all replicas."""
    train_steps: int | None = None
    """Length of the run in steps; null where `epochs` gives it."""
    epochs: float | None = None
    """Length of the run in passes over the data (docs/training.md); null where `train_steps` gives it."""
    precision: str = "bf16"
    """bf16 or fp32."""
    device: str = "auto"
    """cpu or cuda; auto takes a GPU where there is one."""
    seed: int = 1234
    """Of new weights."""
    timeout_seconds: float = 600
    """Longest time without a micro-batch or a checkpoint done; then the watchdog names the rank and ends the run."""


@dataclass(frozen=True)
class Trainer:
    """What the loop works with, made by runs/trainer.py."""

    config: TrainingConfig
    train_steps: int
    """Length of the run."""
    device: torch.device
    model: list[DistributedDataParallel]
    """The chunks of this rank's stage, with gradient buffers."""
    bare_model: ModelChunks
    optimizer: MegatronOptimizer
    rates: OptimizerConfig
    scheduler: OptimizerParamScheduler
    loader: Loader
    data: DataConfig
    save_every_steps: int


@dataclass(frozen=True)
class Reports:
    """What writes a step down."""

    metrics: MetricsWriter
    samples: SampleWriter
    """Which samples were bad and, if asked, which were used."""

    def close(self) -> None:
        """Flush and close."""
        self.metrics.close()
        self.samples.close()


@dataclass(frozen=True)
class Outcome:
    """How the loop ended."""

    progress: Progress
    finished: bool


def train(
    trainer: Trainer,
    start: Progress,
    reports: Reports,
    stop: StopRequest,
    saver: CheckpointSaver,
) -> Outcome:
    """Train from `start` to the last step, or to a request to stop.

    Args:
        saver: has no save in flight when this returns, nor when it raises UserError.
    """
    with Watchdog(trainer.config.timeout_seconds) as watchdog:
        return _train(trainer, start, reports, stop, saver, watchdog)


def _train(
    trainer: Trainer,
    start: Progress,
    reports: Reports,
    stop: StopRequest,
    saver: CheckpointSaver,
    watchdog: Watchdog,
) -> Outcome:
    progress, bad_samples, seen = start, 0, 0
    reducer = MetricReducer(trainer.device)
    while progress.step < trainer.train_steps:
        began = time.monotonic()
        number = progress.step + 1
        watchdog.beat(number, "reading samples")
        rates = learning_rates(trainer.rates, trainer.optimizer, trainer.scheduler)
        position = progress.position
        result = run_step(
            trainer.model,
            trainer.loader.step(position),
            trainer.loader.num_micro_batches,
            trainer.device,
            trainer.optimizer,
            on_micro_batch=partial(watchdog.beat, number, "micro-batch"),
        )
        trainer.scheduler.step(increment=1)
        watchdog.beat(number, "adding up metrics")
        own_metrics = rank_metrics(result, len(trainer.loader.bad), trainer.bare_model)
        totals = step_totals(reducer.merge(own_metrics), result.grad_norm)
        stops = stop.agree(trainer.device)
        progress = Progress(number, trainer.loader.after(position))
        bad = reports.samples.write(progress.step, trainer.loader, result.keys, totals.bad_samples)
        record = _record(progress, totals, bad, rates, time.monotonic() - began, trainer)
        record["save_wait_seconds"] = saver.take_waited()  # of saves after earlier steps
        reports.metrics.write(record)
        bad_samples += totals.bad_samples
        seen += totals.samples + totals.bad_samples
        _check(totals, progress, (bad_samples, seen), trainer.data.max_bad_fraction, saver)
        watchdog.beat(number, "saving a checkpoint")
        saver.poll()
        done = progress.step == trainer.train_steps
        if done or stops or progress.step % trainer.save_every_steps == 0:
            saver.save(progress, wait=done or stops)
        if stops:
            return Outcome(progress, done)
    return Outcome(progress, True)


def _record(
    progress: Progress,
    totals: StepTotals,
    bad: dict[str, int],
    rates: tuple[float, Mapping[str, float]],
    seconds: float,
    trainer: Trainer,
) -> dict[str, object]:
    record: dict[str, object] = {
        "step": progress.step,
        "consumed_samples": progress.position.consumed_samples,
        "loss": totals.loss,
        "learning_rate": rates[0],
        **({"learning_rates": rates[1]} if rates[1] else {}),
        "grad_norm": totals.grad_norm,
        "samples": totals.samples,
        "tokens": totals.tokens,
        "targets": totals.targets,
        "tiles": totals.tiles,
        "tiles_per_rank": totals.tiles_per_rank,
        "tile_imbalance": totals.tile_imbalance,
        "vision_seconds": totals.vision_seconds,
        "seconds": seconds,
        "bad_samples": totals.bad_samples,
        **totals.adjustments,
        "bad": bad,
        "gates": totals.gates,
    }
    if trainer.data.packing.enabled:
        room = trainer.config.global_batch_size * trainer.data.sequence_length
        record["packing_efficiency"] = totals.tokens / room
    return record


def _check(
    totals: StepTotals, progress: Progress, bad_of_seen: tuple[int, int], limit: float, saver: CheckpointSaver
) -> None:
    """Stop a run that has gone wrong; all ranks see the same totals, and end the save in flight first, of weights before.

    Args:
        bad_of_seen: samples since this process began.
        limit: `data.max_bad_fraction`.
    """
    named = (("loss", totals.loss), ("gradient norm", totals.grad_norm))
    unsound = next(
        (f"{what} of step {progress.step} is {value}" for what, value in named if not math.isfinite(value)), ""
    )
    over = is_over(*bad_of_seen, limit)
    if unsound or over:
        saver.finish()
    if unsound:
        raise DivergedError(f"the {unsound}; {saver.way_back}")
    if over:
        raise UserError(
            f"{bad_of_seen[0]} of {bad_of_seen[1]} samples were bad, over data.max_bad_fraction of {limit}; "
            "quarantine.jsonl in the run's folder names them"
        )
