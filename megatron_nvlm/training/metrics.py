"""The metrics of a step: one JSON object a step, TensorBoard, and a line or a bar on the terminal."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_nvlm.data.prepare import ADJUSTMENTS
from megatron_nvlm.models.chunks import ModelChunks, chunks_of
from megatron_nvlm.models.initialise import named_parameters
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.trackers.beside import start_trackers
from megatron_nvlm.trackers.config import MlflowConfig, WandbConfig
from megatron_nvlm.training.metric import Metric, Reduce
from megatron_nvlm.training.sample_files import open_lines
from megatron_nvlm.training.step import StepResult
from megatron_nvlm.training.validation import describe

GATE, SOURCE_LOSS, SOURCE_TARGETS = "gate/", "source_loss/", "source_targets/"
"""Names of the metrics of gates and of sources (sets of data.train) begin so."""


@dataclass(frozen=True)
class LoggingConfig:
    """Section `logging` of a run."""

    log_every_steps: int = 10
    """Steps between lines on a screen that is no terminal; metrics.jsonl has every step."""
    tensorboard: bool = True
    rank_files: bool = False
    """What ranks other than 0 print goes to RUN_DIR/logs, one file a rank."""
    straggler_steps: int = 20
    """Steps over which ranks are compared; a slow one is named with its node. 0 compares nothing."""
    peak_tflops: float | None = None
    """What a rank's device computes at most, for MFU; null takes it from the table of GPUs (accounting/peaks.py)."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)


@dataclass(frozen=True)
class StepTotals:
    """A step over all ranks."""

    loss: float
    grad_norm: float
    targets: int
    samples: int
    tokens: int
    tiles: int
    tiles_per_rank: float
    """Mean over the ranks that encode."""
    tile_imbalance: float
    """Most tiles that a rank encoded over that mean; 1 is even. 0 without tiles."""
    vision_seconds: float
    """Longest time of a rank in the encoder."""
    bad_samples: int
    adjustments: dict[str, int]
    """Samples that gave something up so that they fit, by name of data.prepare.ADJUSTMENTS."""
    gates: dict[str, float]
    """tanh(gate) of each cross-attention layer."""
    sources: dict[str, dict[str, float]]
    """Loss and targets of each set of data.train by its name; of those with a target in this step."""


def reports_data(model: NVLMModel | ModelChunks) -> bool:
    """Whether this rank is the one of its replica that reports its data."""
    return parallel_state.get_tensor_model_parallel_rank() == 0 and model.pre_process


def rank_metrics(
    result: StepResult, bad_samples: int, model: NVLMModel | ModelChunks, sources: Sequence[str] = ()
) -> list[Metric]:
    """What this rank reports of a step, so that each replica's data and losses are counted once.

    Args:
        bad_samples: of this rank in this step.
        sources: names of the sets of data.train, in their order.
    """
    metrics = [
        Metric("most_encoded_tiles", result.encoded_tiles, Reduce.MAX),
        Metric("vision_seconds", result.vision_seconds, Reduce.MAX),
        Metric("unsound_norms", not math.isfinite(result.grad_norm), Reduce.SUM),
    ]
    first_tensor_rank = parallel_state.get_tensor_model_parallel_rank() == 0
    if first_tensor_rank and model.post_process:
        metrics += [
            Metric("loss_sum", result.loss_sum, Reduce.SUM),
            Metric("targets", result.num_targets, Reduce.SUM),
            *_source_metrics(result, sources),
        ]
    if reports_data(model):
        metrics += [
            Metric("tokens", result.tokens, Reduce.SUM),
            Metric("tiles", result.tiles, Reduce.SUM),
            Metric("bad_samples", bad_samples, Reduce.SUM),
            Metric("samples", sum(map(len, result.keys)), Reduce.SUM),
            *(Metric(name, result.adjustments.get(name, 0), Reduce.SUM) for name in ADJUSTMENTS),
        ]
    if model.pre_process or chunks_of(model)[0].encodes_ahead:
        metrics.append(Metric("tiles_per_rank", result.encoded_tiles, Reduce.MEAN))
    for name, parameter in named_parameters(model):
        if name.endswith("cross_attn_bda.gate"):
            layer = int(name.split(".layers.")[1].split(".")[0])
            gate = float(torch.tanh(parameter.detach().float()))
            metrics.append(Metric(f"{GATE}{layer}", gate, Reduce.MEAN))
    return metrics


def _source_metrics(result: StepResult, sources: Sequence[str]) -> list[Metric]:
    """Sums of losses and numbers of targets by source; of every source, since each step reports the same names."""
    losses, targets = dict.fromkeys(sources, 0.0), dict.fromkeys(sources, 0)
    for sample in result.samples if sources else ():
        losses[sources[sample.dataset]] += sample.loss_sum
        targets[sources[sample.dataset]] += sample.num_targets
    return [
        *(Metric(f"{SOURCE_LOSS}{name}", value, Reduce.SUM) for name, value in losses.items()),
        *(Metric(f"{SOURCE_TARGETS}{name}", value, Reduce.SUM) for name, value in targets.items()),
    ]


def step_totals(merged: dict[str, float], grad_norm: float) -> StepTotals:
    """A step's totals from the metrics of all ranks."""
    layers = sorted(int(name.removeprefix(GATE)) for name in merged if name.startswith(GATE))
    per_rank = merged["tiles_per_rank"]
    targets = {
        name.removeprefix(SOURCE_TARGETS): value for name, value in merged.items() if name.startswith(SOURCE_TARGETS)
    }
    return StepTotals(
        loss=merged["loss_sum"] / max(merged["targets"], 1),
        grad_norm=math.nan if merged["unsound_norms"] and math.isfinite(grad_norm) else grad_norm,
        targets=round(merged["targets"]),
        samples=round(merged["samples"]),
        tokens=round(merged["tokens"]),
        tiles=round(merged["tiles"]),
        tiles_per_rank=per_rank,
        tile_imbalance=merged["most_encoded_tiles"] / per_rank if per_rank else 0.0,
        vision_seconds=merged["vision_seconds"],
        bad_samples=round(merged["bad_samples"]),
        adjustments={name: round(merged[name]) for name in ADJUSTMENTS},
        gates={f"layer_{layer}": merged[f"{GATE}{layer}"] for layer in layers},
        sources={
            name: {"loss": merged[f"{SOURCE_LOSS}{name}"] / count, "targets": round(count)}
            for name, count in targets.items()
            if count
        },
    )


def describe_speed(record: Mapping[str, Any]) -> str:
    """The step's FLOPs a second on a rank, and the share of the peak where that is known."""
    if "tflops_per_rank" not in record:
        return ""
    share = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    return f"{record['tflops_per_rank']:.3g} TFLOP/s a rank{share}"


class MetricsWriter:
    """Writes metrics of rank 0; on other ranks it does nothing.

    Args:
        first_step: steps after it in an existing metrics.jsonl are dropped, since they are about to be made again.
    """

    def __init__(self, run_dir: RunDir, config: LoggingConfig, first_step: int, train_steps: int) -> None:
        self.config = config
        self.active = dist.get_rank() == 0
        self.train_steps = train_steps
        if not self.active:
            return
        self._file = open_lines(run_dir.metrics, first_step)
        self._board = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir.tensorboard), purge_step=first_step + 1)
        self._trackers = start_trackers(run_dir, train_steps, config.wandb, config.mlflow)
        self._bar = (
            tqdm(total=train_steps, initial=first_step, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )
        self._started = time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        """One step. `record` has its number under `step`, its loss under `loss`, and a validation after it, if any."""
        if not self.active:
            return
        self._file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, record["step"])
            for layer, gate in record["gates"].items():
                self._board.add_scalar(f"gates/{layer}", gate, record["step"])
            for name, amount in record.get("flops", {}).items():
                self._board.add_scalar(f"flops/{name}", amount, record["step"])
            for name, source in record["sources"].items():
                self._board.add_scalar(f"source_loss/{name}", source["loss"], record["step"])
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix(loss=f"{record['loss']:.4f}")
        elif record["step"] % self.config.log_every_steps == 0 or record["step"] == self.train_steps:
            print(
                f"step {record['step']}/{self.train_steps}  loss {record['loss']:.4f}  "
                f"lr {record['learning_rate']:.2e}  grad norm {record['grad_norm']:.3f}  "
                f"{record['seconds']:.2f} s/step  {describe_speed(record)}".rstrip(),
                flush=True,
            )
        if "validation" in record:
            shown = (record["validation"], record["validation_seconds"], record.get("validation_warning", ""))
            self.show_validation(record["step"], *shown)

    def show_validation(
        self, step: int, rows: Mapping[str, Mapping[str, Any]], seconds: float, warning: str = ""
    ) -> None:
        """A validation on TensorBoard and on the terminal; `write` calls it for those that a step's record holds."""
        if not self.active:
            return
        if self._board is not None:
            for name, row in rows.items():
                for key in ("loss", "token_accuracy", "loss_rise"):
                    if row.get(key) is not None:
                        self._board.add_scalar(f"validation/{name}/{key}", row[key], step)
        for line in (*describe(step, rows, seconds), *((f"warning: {warning}",) if warning else ())):
            if self._bar is not None:
                self._bar.write(line)
            else:
                print(line, flush=True)

    def say(self, sentence: str) -> None:
        """A line on rank 0's terminal, beside the bar."""
        if self.active:
            tqdm.write(sentence)

    def close(self) -> None:
        """Flush and close."""
        if not self.active:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._trackers is not None:  # they read the file
            self._trackers.close()
        if self._bar is not None:
            self._bar.close()
