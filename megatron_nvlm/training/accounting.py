"""What a step computed and how well it used its ranks: counted on the host, summed with the step's other metrics.

docs/watching.md says what each number means.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from megatron_nvlm.accounting.flops import NO_WORK, Flops, ModelSizes, Work, by_component, count_flops, count_work
from megatron_nvlm.accounting.peaks import peak_tflops_of
from megatron_nvlm.parallel.device import device_name, peak_memory_is_of, take_peak_memory
from megatron_nvlm.parallel.ranges import DATA, NamedRange
from megatron_nvlm.sequence.micro_batch import MicroBatch
from megatron_nvlm.training.metric import Metric, Reduce

WORK = "work/"
"""Names of the metrics of a step's work begin so."""
GIB = 2**30


class MeteredMicroBatches:
    """Passes micro-batches on, and notes how long each was waited for and what it asks of the model."""

    def __init__(self, micro_batches: Iterator[MicroBatch], tokens_per_tile: int) -> None:
        self._micro_batches, self._tokens_per_tile = micro_batches, tokens_per_tile
        self._range = NamedRange(DATA)
        self.work = NO_WORK
        """Real work, without padding, so far."""
        self.rows = 0
        """Decoder and context tokens so far, with padding."""
        self.waited = 0.0
        """Seconds that the loader took to give them."""

    def __iter__(self) -> "MeteredMicroBatches":
        return self

    def __next__(self) -> MicroBatch:
        began = time.monotonic()
        with self._range:
            try:
                micro_batch = next(self._micro_batches)
            finally:
                self.waited += time.monotonic() - began
            self.work += count_work(micro_batch, self._tokens_per_tile)
            self.rows += len(micro_batch.tokens) + len(micro_batch.context_tokens)
        return micro_batch


@dataclass(frozen=True)
class Accounting:
    """Turns what ranks counted into the numbers of a step."""

    sizes: ModelSizes
    trainable: tuple[str, ...]
    device: torch.device
    ranks: int
    peak_by_hand: float | None = None
    """`logging.peak_tflops`."""

    @property
    def peak_tflops(self) -> float | None:
        """Of this rank; None where it is not known."""
        name = device_name(self.device)
        return self.peak_by_hand or (None if name is None else peak_tflops_of(name))

    def describe(self) -> str:
        """A line for the log: what utilisation is a share of."""
        name = device_name(self.device) or "a CPU"
        peak = self.peak_tflops
        if peak is None:
            return f"no MFU: the peak of {name} is not in the table of GPUs; logging.peak_tflops gives it by hand"
        source = "logging.peak_tflops" if self.peak_by_hand else "dense bf16"
        return f"MFU is a share of {peak:g} TFLOP/s a rank ({source}, {name})"

    def meter(self, micro_batches: Iterator[MicroBatch]) -> MeteredMicroBatches:
        """A step's micro-batches, counted as they pass."""
        return MeteredMicroBatches(micro_batches, self.sizes.vision.tokens_per_tile)

    def metrics(self, metered: MeteredMicroBatches, counts_replica: bool) -> list[Metric]:
        """What this rank reports.

        Args:
            counts_replica: whether this rank is the one of its replica that reports its data.
        """
        peak = self.peak_tflops
        metrics = [
            Metric("data_wait_seconds", metered.waited, Reduce.MAX),
            Metric("peak_memory_bytes", take_peak_memory(self.device), Reduce.MAX),
            Metric("ranks_without_peak", peak is None, Reduce.SUM),
            Metric("peak_tflops", peak or 0.0, Reduce.SUM),
        ]
        if counts_replica:
            metrics.append(Metric("rows", metered.rows, Reduce.SUM))
            metrics += [Metric(WORK + name, count, Reduce.SUM) for name, count in asdict(metered.work).items()]
        return metrics

    def step_flops(self, work: Work) -> dict[str, Flops]:
        """Operations of a step by component, on all ranks."""
        return by_component(self.sizes, count_flops(self.sizes, work, self.trainable))

    def fields(self, merged: dict[str, float], seconds: float) -> dict[str, object]:
        """Fields of metrics.jsonl.

        Args:
            merged: metrics of all ranks.
            seconds: of the step.
        """
        work = Work(*(round(merged[WORK + name]) for name in asdict(NO_WORK)))
        parts = self.step_flops(work)
        model, executed = (sum(getattr(part, kind) for part in parts.values()) for kind in ("model", "executed"))
        rank_seconds = self.ranks * seconds
        fields: dict[str, object] = {
            "flops": {name: part.model for name, part in parts.items()},
            "model_flops": model,
            "hardware_flops": executed,
            "vision_share": parts["vision_model"].model / model if model else 0.0,
            "tflops_per_rank": model / rank_seconds / 1e12,
            "hardware_tflops_per_rank": executed / rank_seconds / 1e12,
        }
        if not merged["ranks_without_peak"]:
            possible = merged["peak_tflops"] * 1e12 * seconds
            fields |= {"mfu": model / possible, "hfu": executed / possible}
        real_rows = work.num_tokens + work.num_context_tokens
        return fields | {
            "real_tokens": work.num_tokens,
            "samples_per_second_per_rank": merged["samples"] / rank_seconds,
            "tokens_per_second_per_rank": work.num_tokens / rank_seconds,
            "tiles_per_second_per_rank": work.tiles / rank_seconds,
            "padding_share": 1 - real_rows / merged["rows"] if merged["rows"] else 0.0,
            "data_wait_seconds": merged["data_wait_seconds"],
            "data_wait_share": min(1.0, merged["data_wait_seconds"] / seconds),
            "peak_memory_gib": merged["peak_memory_bytes"] / GIB,
            "peak_memory_of": peak_memory_is_of(self.device),
        }
