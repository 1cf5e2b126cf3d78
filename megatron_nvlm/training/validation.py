"""Validation while a run trains: loss and token accuracy of named sets, with the state of training untouched.

Every sample is read in a fixed order and passes the schedule of a step forward only, in evaluation mode: no dropout, no
gradient, no random number. Sums of losses and numbers of targets are added up over all ranks, so the result does not
depend on the layout. What a set's text-only loss was before step 1 stays in the run directory, as a measure of the
language model that the run began with.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_nvlm.data.config import ValidationConfig
from megatron_nvlm.data.fingerprint import content_of
from megatron_nvlm.data.loading.builder import ListedData
from megatron_nvlm.data.loading.loader import Loader
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.training.step import SampleLoss, evaluate_step

logger = logging.getLogger(__name__)

IMAGES, TEXT = "images", "text"
"""Kinds of samples: with images, and text only."""
_FIELDS = 4
"""Of the sums: losses, targets, targets that were most likely, samples."""


@dataclass(frozen=True)
class Row:
    """One kind of samples of one set."""

    loss: float | None
    """Mean over targets, in nats; None without targets."""
    token_accuracy: float | None
    """Share of targets that are the most likely token."""
    targets: int
    samples: int
    bad_samples: int
    """Samples that could not be used."""


@dataclass(frozen=True)
class Measured:
    """One validation."""

    rows: Mapping[str, Row]
    """By set and kind: `NAME/images`, `NAME/text`."""
    seconds: float


@contextmanager
def evaluation_mode(models: list[DistributedDataParallel]) -> Iterator[None]:
    """Dropout off while the block lasts; afterwards each module is as it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class Validator:
    """Measures the validation sets of a run; every rank calls it."""

    config: ValidationConfig
    data: ListedData
    models: list[DistributedDataParallel]
    device: torch.device
    open_loader: Callable[[], Loader]
    """A loader over `data`; its workers end with each validation."""
    at_start: "StartLosses"

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether to measure after this step."""
        return is_last or step % self.config.every_steps == 0

    def measure(self, on_micro_batch: Callable[[tuple[str, ...]], None], stops: Callable[[], bool]) -> Measured | None:
        """Measure all sets.

        Args:
            on_micro_batch: told the names of the samples as each micro-batch begins.
            stops: asked between rounds of micro-batches on every rank, with the same answer; then there is no result.
        """
        began = time.monotonic()
        sums = torch.zeros(len(self.data.sets), 2, _FIELDS, dtype=torch.float64)  # [sets, kinds, fields]
        loader, position = self.open_loader(), DataPosition()
        try:
            with evaluation_mode(self.models):
                for number in range(self.data.plan.rounds):
                    if number and stops():
                        return None
                    micro_batches = loader.step(position)
                    count = loader.num_micro_batches
                    for sample in evaluate_step(self.models, micro_batches, count, self.device, on_micro_batch):
                        _add(sums, sample)
                    position = loader.after(position)
        finally:
            loader.close()
        if parallel_state.get_tensor_model_parallel_rank():  # each replica's samples count once
            sums.zero_()
        sums = sums.to(self.device)
        dist.all_reduce(sums)
        return Measured(self._rows(sums.tolist()), time.monotonic() - began)

    def _rows(self, sums: list[list[list[float]]]) -> dict[str, Row]:
        rows = {}
        for number, one in enumerate(self.config.sets):
            for kind, name in enumerate((IMAGES, TEXT)):
                listed = self.data.order.group_sizes[2 * number + kind]
                if listed:
                    loss, targets, right, samples = sums[number][kind]
                    rows[f"{one.label}/{name}"] = Row(
                        loss=loss / targets if targets else None,
                        token_accuracy=right / targets if targets else None,
                        targets=round(targets),
                        samples=round(samples),
                        bad_samples=listed - round(samples),
                    )
        return rows


def _add(sums: torch.Tensor, sample: SampleLoss) -> None:
    values = (sample.loss_sum, sample.num_targets, sample.num_right, 1)
    sums[sample.dataset, 0 if sample.has_images else 1] += torch.tensor(values, dtype=torch.float64)


class StartLosses:
    """What was measured before step 1, kept in the run directory: the language model that the run began with.

    Only rank 0 has it. A set that has other samples than then is compared with nothing.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path, data: ListedData) -> None:
        self.path = path
        self._content = [
            f"{content_of(shards)} {data.order.group_sizes[2 * number]} {data.order.group_sizes[2 * number + 1]}"
            for number, shards in enumerate(data.sets)
        ]
        self._losses: dict[str, float] = {}

    def keep(self, measured: Measured, config: ValidationConfig) -> None:
        """Write it down."""
        if dist.get_rank():
            return
        content = dict(zip((one.label for one in config.sets), self._content, strict=True))
        rows = {name: asdict(row) for name, row in measured.rows.items()}
        self.path.write_text(json.dumps({"rows": rows, "samples_of_sets": content}, indent=1) + "\n")
        self._take(rows, content, config)

    def read(self, config: ValidationConfig) -> None:
        """Read what an earlier start of the run wrote down."""
        if dist.get_rank():
            return
        try:
            stored = json.loads(self.path.read_text())
            self._take(stored["rows"], stored["samples_of_sets"], config)
        except FileNotFoundError:
            logger.warning("this run did not measure its validation sets before step 1; no text-only loss is compared")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read (%s); no text-only loss is compared with the start", self.path, error)

    def _take(self, rows: Mapping[str, Any], content: Mapping[str, str], config: ValidationConfig) -> None:
        for one, now in zip(config.sets, self._content, strict=True):
            name = f"{one.label}/{TEXT}"
            if content.get(one.label) == now and rows.get(name, {}).get("loss") is not None:
                self._losses[name] = float(rows[name]["loss"])

    def compare(self, rows: Mapping[str, Row], margin: float) -> tuple[dict[str, dict[str, Any]], str]:
        """Rows as metrics have them, and a warning if a text-only loss has risen above its margin.

        Those of text only have `loss_at_start`, `loss_rise` and `over_margin` too, where the start was measured.
        """
        plain = {name: asdict(row) for name, row in rows.items()}
        risen = []
        for name, at_start in self._losses.items():
            loss = rows[name].loss if name in rows else None
            if loss is not None:
                rise = loss - at_start
                over = not rise <= margin  # true of a loss that is no number, too
                plain[name] |= {"loss_at_start": at_start, "loss_rise": rise, "over_margin": over}
                if over:
                    risen.append(f"{name} {loss:.4f}, {rise:+.4f} since the start ({at_start:.4f})")
        if not risen:
            return plain, ""
        return plain, (
            f"text-only loss has risen by more than validation.text_margin of {margin:g}: {'; '.join(risen)}; the language "
            "model loses text skill: add text-only samples to data.train, or lower its rate (optimizer.component_lr)"
        )


def describe(step: int, rows: Mapping[str, Mapping[str, Any]], seconds: float) -> list[str]:
    """Lines for the log."""
    lines = []
    for name, row in rows.items():
        numbers = "no targets"
        if row["loss"] is not None:
            numbers = f"loss {row['loss']:.4f}  token accuracy {row['token_accuracy']:.1%}"
            if "loss_rise" in row and step:
                numbers += f"  {row['loss_rise']:+.4f} since the start"
        bad = f", {row['bad_samples']} bad" if row["bad_samples"] else ""
        lines.append(f"validation after step {step}  {name}  {numbers}  ({row['samples']} samples{bad})")
    return [*lines, f"validation after step {step} took {seconds:.1f} s"]
