"""What a step is worth knowing: one JSON object a step, TensorBoard, and a line or a bar for whoever watches."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_nvlm.models.chunks import ModelChunks, chunks_of
from megatron_nvlm.models.initialise import named_parameters
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.training.sample_files import open_lines
from megatron_nvlm.training.step import StepResult

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class LoggingConfig:
    """Section `logging` of a run."""

    log_every_steps: int = 10
    """Steps between lines on a screen that is no terminal; metrics.jsonl has every step."""
    tensorboard: bool = True


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
    stop: bool
    gates: dict[str, float]


def total_over_ranks(result: StepResult, bad_samples: int, stop: bool, model: NVLMModel | ModelChunks) -> StepTotals:
    """Sum what each replica did once, in two collectives that every rank joins.

    Args:
        bad_samples: of this rank in this step.
    """
    first_tensor_rank = parallel_state.get_tensor_model_parallel_rank() == 0
    counts_data = first_tensor_rank and model.pre_process
    counts_loss = first_tensor_rank and model.post_process
    num_layers = model.config.num_layers
    head = [
        result.loss_sum * counts_loss,
        result.num_targets * counts_loss,
        result.tokens * counts_data,
        result.tiles * counts_data,
        bad_samples * counts_data,
        sum(map(len, result.keys)) * counts_data,
        float(stop),
        float(result.encoded_tiles),
        float(model.pre_process or chunks_of(model)[0].encodes_ahead),
    ]
    gates = [0.0] * (2 * num_layers)  # tanh(gate) of each layer, then how many ranks hold that layer's gate
    for name, parameter in named_parameters(model):
        if name.endswith("cross_attn_bda.gate"):
            layer = int(name.split(".layers.")[1].split(".")[0])
            gates[layer] = float(torch.tanh(parameter.detach().float()))
            gates[num_layers + layer] = 1.0
    vector = torch.tensor([*head, *gates], dtype=torch.float64, device=next(model.parameters()).device)
    dist.all_reduce(vector)
    loss_sum, targets, tokens, tiles, bad, samples, stops, encoded, encoders, *all_gates = vector.tolist()
    most, vision_seconds = _largest(vector, result.encoded_tiles, result.vision_seconds)
    per_rank = encoded / max(encoders, 1)
    return StepTotals(
        loss=loss_sum / max(targets, 1),
        grad_norm=result.grad_norm,
        targets=round(targets),
        samples=round(samples),
        tokens=round(tokens),
        tiles=round(tiles),
        tiles_per_rank=per_rank,
        tile_imbalance=most / per_rank if per_rank else 0.0,
        vision_seconds=vision_seconds,
        bad_samples=round(bad),
        stop=stops > 0,
        gates={
            f"layer_{layer}": all_gates[layer] / all_gates[num_layers + layer]
            for layer in range(num_layers)
            if all_gates[num_layers + layer]
        },
    )


def _largest(like: torch.Tensor, *numbers: float) -> list[float]:
    """Of each number, the largest of any rank."""
    vector = torch.tensor(numbers, dtype=torch.float64, device=like.device)
    dist.all_reduce(vector, op=dist.ReduceOp.MAX)
    return vector.tolist()


class MetricsWriter:
    """Writes metrics of rank 0; on other ranks it does nothing.

    Args:
        first_step: steps behind it in an existing metrics.jsonl are dropped, since they are about to be made again.
    """

    def __init__(self, run_dir: Path, config: LoggingConfig, first_step: int, train_steps: int) -> None:
        self.config = config
        self.active = dist.get_rank() == 0
        self.train_steps = train_steps
        if not self.active:
            return
        self._file = open_lines(run_dir / METRICS_FILE, first_step)
        self._board = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self._bar = (
            tqdm(total=train_steps, initial=first_step, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )
        self._started = time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        """One step. `record` has its number under `step` and its loss under `loss`."""
        if not self.active:
            return
        self._file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, record["step"])
            for layer, gate in record["gates"].items():
                self._board.add_scalar(f"gates/{layer}", gate, record["step"])
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix(loss=f"{record['loss']:.4f}")
        elif record["step"] % self.config.log_every_steps == 0 or record["step"] == self.train_steps:
            print(
                f"step {record['step']}/{self.train_steps}  loss {record['loss']:.4f}  "
                f"lr {record['learning_rate']:.2e}  grad norm {record['grad_norm']:.3f}  "
                f"{record['seconds']:.2f} s/step",
                flush=True,
            )

    def close(self) -> None:
        """Flush and close."""
        if not self.active:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.close()
