"""Updates that are left out: values that are not finite, and spikes of loss or gradient norm.

The step counts, its samples are consumed and the schedule goes on; weights and optimizer state stay. All ranks decide alike,
from the loss and the norm over all of them. What earlier steps did is read from metrics.jsonl, so a run that goes on from a
checkpoint decides as one that was never interrupted. The rules are our choice; the paper says nothing of spikes.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_nvlm.errors import UserError
from megatron_nvlm.metrics_lines import LineFollower, is_step

LEAST_STEPS = 10
"""Steps before which there is no median to call a value a spike by."""


@dataclass(frozen=True)
class StabilityConfig:
    """Section `stability` of a run: which updates are left out, and how many may be."""

    max_skipped: int = 0
    """Updates that may be left out among the last `window_steps`; one more ends the run. 0 ends it at the first."""
    window_steps: int = 100
    """Steps over which updates left out are counted and medians are taken."""
    grad_norm_spike: float | None = None
    """A gradient norm over this multiple of the median is a spike; null for none."""
    loss_spike: float | None = None
    """A loss over this multiple of the median is a spike; null for none."""

    @property
    def judges(self) -> bool:
        """Whether updates are looked at before they are made; without it a value that is not finite ends the run."""
        return self.max_skipped > 0 or self.grad_norm_spike is not None or self.loss_spike is not None


def check_stability(config: StabilityConfig) -> None:
    """Refuse numbers by which no update could be judged."""
    if config.max_skipped < 0:
        raise UserError(f"stability.max_skipped is {config.max_skipped}; it must be 0 or more")
    if config.window_steps < LEAST_STEPS:
        raise UserError(f"stability.window_steps is {config.window_steps}; it must be at least {LEAST_STEPS}")
    for name, multiple in (("grad_norm_spike", config.grad_norm_spike), ("loss_spike", config.loss_spike)):
        if multiple is not None and not 1 < multiple < math.inf:
            raise UserError(f"stability.{name} is {multiple}; it must be a number above 1, or null for none")


@dataclass(frozen=True)
class _Step:
    loss: float
    grad_norm: float
    skipped: bool


class SkippedUpdates:
    """Judges the update of each step; the same on every rank.

    Args:
        steps: lines of metrics.jsonl up to the step from which the run goes on.
    """

    def __init__(self, config: StabilityConfig, steps: Iterable[Mapping[str, Any]] = ()) -> None:
        self.config = config
        self._steps: deque[_Step] = deque(maxlen=config.window_steps)
        for step in steps:
            self._steps.append(_Step(float(step["loss"]), float(step["grad_norm"]), "skipped" in step))

    def judge(self, loss: float, grad_norm: float) -> str:
        """Why the update of the next step is left out; nothing for one that is made. It counts the step."""
        values = (
            ("loss", loss, [step.loss for step in self._steps if not step.skipped], self.config.loss_spike),
            (
                "gradient norm",
                grad_norm,
                [step.grad_norm for step in self._steps if not step.skipped],
                self.config.grad_norm_spike,
            ),
        )
        reason = next((reason for reason in (_fault(*value) for value in values) if reason), "")
        self._steps.append(_Step(loss, grad_norm, bool(reason)))
        return reason

    @property
    def over_limit(self) -> str:
        """Why the run ends: too many updates were left out; nothing while there are not."""
        skipped = sum(step.skipped for step in self._steps)
        if skipped <= self.config.max_skipped:
            return ""
        return (
            f"{skipped} of the last {len(self._steps)} updates were left out, over stability.max_skipped of "
            f"{self.config.max_skipped}"
        )


def _fault(name: str, value: float, before: list[float], spike: float | None) -> str:
    if not math.isfinite(value):
        return f"the {name} is {value}"
    if spike is not None and len(before) >= LEAST_STEPS and value > spike * (usual := median(before)):
        return f"the {name} of {value:.4g} is over {spike:g} times the median of {usual:.4g}"
    return ""


def read_steps(metrics: Path, last_step: int, window_steps: int) -> list[dict[str, Any]]:
    """The last lines of metrics.jsonl up to a step, as rank 0 reads them; every rank calls it and gets the same."""
    read: list[list[dict[str, Any]]] = [[]]
    if dist.get_rank() == 0:
        made = [row for row in LineFollower(metrics).read().records if is_step(row) and row["step"] <= last_step]
        told = [row for row in made if {"loss", "grad_norm"} <= row.keys()][-window_steps:]
        read[0] = [{name: row[name] for name in ("loss", "grad_norm", "skipped") if name in row} for row in told]
    dist.broadcast_object_list(read, src=0)
    return read[0]


def agree(loss_sum: float, num_targets: float, grad_norm: float, device: torch.device) -> tuple[float, float]:
    """(mean loss, gradient norm) over all ranks, in one collective.

    Args:
        loss_sum: over the targets of this rank's replica; 0 on ranks that do not report it.
        grad_norm: of this rank; one that is not finite anywhere is so everywhere.
    """
    unsound = not math.isfinite(grad_norm)
    shared = torch.tensor([loss_sum, num_targets, float(unsound)], dtype=torch.float64, device=device)
    dist.all_reduce(shared)
    total, targets, unsound_ranks = shared.tolist()
    return total / max(targets, 1), math.nan if unsound_ranks and not unsound else grad_norm
