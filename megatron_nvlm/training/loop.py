"""The loop, and nothing else: step, write down, save, stop."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from megatron_nvlm.parallel import ranges
from megatron_nvlm.training.accounting import Accounting, MeteredMicroBatches
from megatron_nvlm.training.bad_share import is_over
from megatron_nvlm.training.faults import StopRequest
from megatron_nvlm.training.metric import MetricReducer
from megatron_nvlm.training.metrics import MetricsWriter, StepTotals, rank_metrics, reports_data, step_totals
from megatron_nvlm.training.optimizer import OptimizerConfig, learning_rates
from megatron_nvlm.training.profiling import StepProfiler
from megatron_nvlm.training.sample_files import SampleWriter
from megatron_nvlm.training.skipped_updates import SkippedUpdates, agree
from megatron_nvlm.training.step import StepResult, run_step
from megatron_nvlm.training.stragglers import StragglerWatch, as_metric
from megatron_nvlm.training.validation import Validator
from megatron_nvlm.training.watchdog import SAVE, START, STEP, Watchdog

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
    """Longest time of a step without a micro-batch done; then the watchdog names the rank and ends the run."""
    start_timeout_seconds: float = 1800
    """The same of the start, while the model is built and a checkpoint is read."""
    save_timeout_seconds: float = 1800
    """The same of a save."""
    profile: str | None = None
    """Steps to profile, as 12 or 10-12, into RUN_DIR/profile; null for none."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write a trace and a table of them."""

    @property
    def limits(self) -> dict[str, float]:
        """Longest seconds without a sign of life, by key."""
        return {key: getattr(self, key) for key in (STEP, START, SAVE)}


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
    accounting: Accounting
    validator: Validator | None = None
    """None where `validation.sets` names none."""


@dataclass(frozen=True)
class Reports:
    """What writes a step down."""

    metrics: MetricsWriter
    samples: SampleWriter
    """Which samples were bad or in a skipped update and, if asked, which were used."""
    stragglers: StragglerWatch
    profiler: StepProfiler

    def note_troubles(self, step: int, result: StepResult) -> Mapping[str, object]:
        """Say which ranks are slow and which update was left out; every rank calls it. Returns fields of metrics.jsonl."""
        slow = self.stragglers.note(result.own_seconds)
        for straggler in slow:
            self.metrics.say(straggler.describe(self.stragglers.window_steps))
        if not result.skipped:
            return as_metric(slow)
        self.samples.write_skipped(step, result.skipped, result.keys)
        return {**as_metric(slow), "skipped": result.skipped}

    def close(self) -> None:
        """Flush and close."""
        self.profiler.close()
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
    updates: SkippedUpdates,
    watchdog: Watchdog,
) -> Outcome:
    """Train from `start` to the last step, or to a request to stop.

    Args:
        saver: has no save in flight when this returns, nor when it raises UserError.
    """
    progress, bad_samples, seen = start, 0, 0
    reducer = MetricReducer(trainer.device)
    measured = _Validation(trainer, reports.metrics, stop, saver, watchdog)
    if not measured.begin(start.step):
        return Outcome(start, False)
    while progress.step < trainer.train_steps:
        began = time.monotonic()
        number = progress.step + 1
        watchdog.beat(number, "reading samples")
        reports.profiler.begin(number)
        rates = learning_rates(trainer.rates, trainer.optimizer, trainer.scheduler)
        position = progress.position
        micro_batches = trainer.accounting.meter(trainer.loader.step(position))
        result = _run(trainer, micro_batches, updates, partial(watchdog.beat, number, "micro-batch"))
        trainer.scheduler.step(increment=1)
        watchdog.beat(number, "adding up metrics")
        merged = _merge(trainer, reducer, result, micro_batches)
        totals = step_totals(merged, result.grad_norm)
        stops = stop.agree(trainer.device)
        progress = Progress(number, trainer.loader.after(position))
        bad = reports.samples.write(progress.step, trainer.loader, result.keys, totals.bad_samples)
        seconds = time.monotonic() - began
        record = _record(progress, totals, bad, rates, seconds, trainer) | trainer.accounting.fields(merged, seconds)
        record["save_wait_seconds"] = saver.take_waited()  # of saves after earlier steps
        record.update(reports.note_troubles(number, result))
        done = progress.step == trainer.train_steps
        if not stops:
            stops = measured.after(progress.step, done, record)
        reports.metrics.write(record)
        bad_samples += totals.bad_samples
        seen += totals.samples + totals.bad_samples
        _check_update(totals, result, progress, updates, saver)
        _check_samples((bad_samples, seen), trainer.data.max_bad_fraction, saver)
        watchdog.beat(number, "saving a checkpoint", limit=SAVE)
        with ranges.NamedRange(ranges.SAVE):
            saver.poll()
            if done or stops or progress.step % trainer.save_every_steps == 0:
                saver.save(progress, wait=done or stops)
        reports.profiler.end(number)
        if stops:
            return Outcome(progress, done)
    return Outcome(progress, True)


def _run(
    trainer: Trainer,
    micro_batches: MeteredMicroBatches,
    updates: SkippedUpdates,
    on_micro_batch: Callable[[tuple[str, ...]], None],
) -> StepResult:
    return run_step(
        trainer.model,
        micro_batches,
        trainer.loader.num_micro_batches,
        trainer.device,
        trainer.optimizer,
        on_micro_batch=on_micro_batch,
        judge=partial(_judge, updates, trainer.device) if updates.config.judges else None,
    )


def _merge(
    trainer: Trainer, reducer: MetricReducer, result: StepResult, micro_batches: MeteredMicroBatches
) -> dict[str, float]:
    """The step's metrics of all ranks, behind everything else that the step does."""
    sources = [source.label for source in trainer.data.train]
    metrics = rank_metrics(result, len(trainer.loader.bad), trainer.bare_model, sources)
    metrics += trainer.accounting.metrics(micro_batches, reports_data(trainer.bare_model))
    with ranges.NamedRange(ranges.METRICS):
        return reducer.merge(metrics)


class _Validation:
    """The run's validations; without a validator they do nothing."""

    def __init__(
        self, trainer: Trainer, metrics: MetricsWriter, stop: StopRequest, saver: CheckpointSaver, watchdog: Watchdog
    ) -> None:
        self.trainer, self.metrics, self.stop, self.saver, self.watchdog = trainer, metrics, stop, saver, watchdog
        self._at_start: dict[str, object] = {}

    def begin(self, step: int) -> bool:
        """Measure before step 1, or read what was measured then; False if the run is to stop."""
        validator = self.trainer.validator
        if validator is None:
            return True
        if step:
            validator.at_start.read(validator.config)
            return True
        return self._measure(0, self._at_start, "validation_at_start")

    def after(self, step: int, is_last: bool, record: dict[str, object]) -> bool:
        """Measure after a step, where that is due, for its record; True if the run is to stop."""
        record.update(self._at_start)
        self._at_start = {}
        validator = self.trainer.validator
        if validator is None or not validator.is_due(step, is_last):
            return False
        return not self._measure(step, record, "validation")

    def _measure(self, step: int, record: dict[str, object], key: str) -> bool:
        validator = self.trainer.validator
        assert validator is not None
        self.watchdog.beat(step, "validation")
        with ranges.NamedRange(ranges.VALIDATION):
            measured = validator.measure(partial(self.watchdog.beat, step, "validation"), self._stops)
        if measured is None:
            return False
        if step == 0:
            validator.at_start.keep(measured, validator.config)
        rows, warning = validator.at_start.compare(measured.rows, validator.config.text_margin)
        record |= {key: rows, f"{key}_seconds": measured.seconds}
        if warning:
            record[f"{key}_warning"] = warning
        if step == 0:
            self.metrics.show_validation(step, rows, measured.seconds)
        return True

    def _stops(self) -> bool:
        self.saver.poll()  # a save in flight is not kept waiting
        return self.stop.agree(self.trainer.device)


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
        "sources": totals.sources,
    }
    if trainer.data.packing.enabled:
        room = trainer.config.global_batch_size * trainer.data.sequence_length
        record["packing_efficiency"] = totals.tokens / room
    return record


def _judge(updates: SkippedUpdates, device: torch.device, loss_sum: float, num_targets: float, norm: float) -> str:
    return updates.judge(*agree(loss_sum, num_targets, norm, device))


def _check_update(
    totals: StepTotals, result: StepResult, progress: Progress, updates: SkippedUpdates, saver: CheckpointSaver
) -> None:
    """Stop a run that has diverged; all ranks see the same totals, and end the save in flight first, of weights before."""
    if result.skipped:
        if updates.over_limit:
            saver.finish()
            raise DivergedError(f"{result.skipped} in step {progress.step}; {updates.over_limit}; {saver.way_back}")
        return
    named = (("loss", totals.loss), ("gradient norm", totals.grad_norm))
    unsound = next(
        (f"{what} of step {progress.step} is {value}" for what, value in named if not math.isfinite(value)), ""
    )
    if unsound:
        saver.finish()
        raise DivergedError(f"the {unsound}; {saver.way_back}")


def _check_samples(bad_of_seen: tuple[int, int], limit: float, saver: CheckpointSaver) -> None:
    """Stop a run with too many bad samples; all ranks see the same totals, and end the save in flight first.

    Args:
        bad_of_seen: samples since this process began.
        limit: `data.max_bad_fraction`.
    """
    if is_over(*bad_of_seen, limit):
        saver.finish()
        raise UserError(
            f"{bad_of_seen[0]} of {bad_of_seen[1]} samples were bad, over data.max_bad_fraction of {limit}; "
            "quarantine.jsonl in the run's folder names them"
        )
