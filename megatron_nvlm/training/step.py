"""One step: forward and backward of all micro-batches, gradients over all ranks, one update."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import tee
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_nvlm.models.chunks import ModelChunks, chunks_of
from megatron_nvlm.models.clocks import DeviceClock
from megatron_nvlm.models.gradient_marks import SUM_OVER_MODEL_PARALLEL, SUM_OVER_TENSOR_PARALLEL, marked
from megatron_nvlm.models.language_model import TargetLosses
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.precision import Precision
from megatron_nvlm.parallel.message_shapes import MessageShapes, Shape
from megatron_nvlm.parallel.ranges import GRADIENTS, OPTIMIZER, VISION, NamedRange
from megatron_nvlm.parallel.vision_ahead import SpreadVision
from megatron_nvlm.sequence.micro_batch import MicroBatch

Judge = Callable[[float, float, float], str]
"""(sum of this rank's losses, their number, gradient norm) -> why the update is left out, or nothing."""


@dataclass(frozen=True)
class StepResult:
    """What a step did on this rank; the loss is known on the last pipeline stage only (0 elsewhere)."""

    loss_sum: float
    num_targets: float
    grad_norm: float
    tokens: int
    tiles: int
    """Of this replica."""
    keys: tuple[tuple[str, ...], ...]
    """Of the samples of each micro-batch of this rank."""
    adjustments: Mapping[str, int]
    """Number of this replica's samples that gave something up, by name of data.prepare.ADJUSTMENTS."""
    encoded_tiles: int
    """Of the tiles, by this rank."""
    vision_seconds: float
    """In the encoder and, where tiles of the step are shared, until all features are in place."""
    own_seconds: float
    """Until the gradients of this rank's replica were ready, before other replicas are waited for."""
    skipped: str
    """Why the update was left out; empty for one that was made."""
    samples: tuple["SampleLoss", ...]
    """Of this replica, in order; known on the last pipeline stage only."""


@dataclass(frozen=True)
class SampleLoss:
    """What a micro-batch's forward pass gave of one sample."""

    dataset: int
    """Which of the sets it is from."""
    has_images: bool
    loss_sum: float
    """Over its targets, in nats."""
    num_targets: int
    num_right: int
    """Targets that are the most likely token; 0 in training."""


def wrap_model(
    model: NVLMModel | ModelChunks, precision: Precision, use_distributed_optimizer: bool
) -> list[DistributedDataParallel]:
    """The chunks with gradient buffers, summed over data-parallel ranks and divided by the targets of the global batch."""
    chunks = chunks_of(model)
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=use_distributed_optimizer,
        grad_reduce_in_fp32=precision.gradient_dtype != precision.parameter_dtype,
        average_in_collective=False,
        # One bucket a buffer: nothing is overlapped yet. With several, core (0.16.1 to 0.19.2) would save moments shifted by
        # the padding between buckets (Megatron-LM #5077); our saves do not (core_compat.py).
        overlap_grad_reduce=False,
    )
    return [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]


def finalize_gradients(
    models: list[Any],
    num_targets: Tensor | None = None,
    vision: SpreadVision | None = None,
    clock: DeviceClock | None = None,
    **kwargs: Any,
) -> None:
    """Finalize gradients as Megatron-core does, with what it does not know of.

    First, the backward pass of an encoder that worked ahead of the pipeline. Afterwards, all-reduce the gradients of
    parameters that carry a mark of models/gradient_marks.py.

    Args:
        clock: of the work before other replicas are waited for; it stops here.
    """
    if vision is not None:
        with NamedRange(VISION):
            vision.backward()
    if clock is not None:
        clock.stop()
    with NamedRange(GRADIENTS):
        finalize_model_grads(models, **kwargs)
        if num_targets is not None:
            _divide_by_targets(models, num_targets)
        _sum_over(parallel_state.get_tensor_model_parallel_group(), models, SUM_OVER_TENSOR_PARALLEL)
        _sum_over(parallel_state.get_model_parallel_group(), models, SUM_OVER_MODEL_PARALLEL)


def _divide_by_targets(models: list[Any], num_targets: Tensor) -> None:
    """Divide gradients by the targets of the global batch; core does the same, but the host waits to see if there are any.

    Args:
        num_targets: of this rank's micro-batches, int32; known on the last pipeline stage.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(num_targets, src=dist.get_process_group_ranks(pipeline)[-1], group=pipeline)
    dist.all_reduce(num_targets, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    factor = 1.0 / num_targets.clamp(min=1)
    for model in models:
        model.scale_gradients(factor)


def _sum_over(group: dist.ProcessGroup, models: list[Any], mark: str) -> None:
    """Sum the gradients of the parameters with that mark."""
    if group.size() == 1:
        return
    gradients = [
        parameter.main_grad  # type: ignore[attr-defined]
        for model in models
        for parameter in marked(model.parameters(), mark)
    ]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def loss_function(micro_batch: MicroBatch, losses: TargetLosses) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses of the targets and their number; core divides once, by the number in the global batch."""
    num_targets = micro_batch.loss_mask.sum()
    report = torch.stack([losses.total.detach().double(), num_targets.double()])
    return losses.total, num_targets.to(torch.int), {"loss": report, "samples": _sample_sums(micro_batch, losses)}


def _sample_sums(micro_batch: MicroBatch, losses: TargetLosses) -> Tensor:
    """Sum of losses, targets, and targets that are most likely, of each sample: float64 [3, samples]."""
    sample = torch.bucketize(micro_batch.target_rows, micro_batch.cu_seqlens[1:], right=True)  # [r]
    numbers = torch.arange(len(micro_batch.keys), device=sample.device)  # [samples]
    own = sample == numbers[:, None]  # [samples, r]
    right = torch.zeros_like(own) if losses.right is None else own & losses.right
    # Chosen, not multiplied: the loss of one sample may be infinite. One order of the sum: two runs give equal bits.
    sums = torch.where(own, losses.each.double(), 0.0).sum(1)  # [samples]
    return torch.stack([sums, own.sum(1).double(), right.sum(1).double()])


class _Numbers(NamedTuple):
    """Numbers of a step on the host."""

    grad_norm: float
    loss_sum: float
    num_targets: float
    samples: tuple[SampleLoss, ...]


class _ForwardSteps:
    """The micro-batches of a step on their way through this rank's chunks, and what they were."""

    def __init__(
        self,
        models: list[DistributedDataParallel],
        micro_batches: Iterator[MicroBatch],
        device: torch.device,
        on_micro_batch: Callable[[tuple[str, ...]], None],
    ) -> None:
        self.first_model = models[0]
        self.first_chunk: NVLMModel = models[0].module
        self.device, self.on_micro_batch = device, on_micro_batch
        self.tokens = self.tiles = 0
        self.samples: list[tuple[int, bool]] = []
        """Set of each sample, and whether it has images."""
        self.keys: list[tuple[str, ...]] = []
        self.adjustments: Counter[str] = Counter()
        self.vision: SpreadVision | None = None
        self.work: Iterator[tuple[MicroBatch, Tensor | None]] = ((one, None) for one in micro_batches)
        """Micro-batches, with the features of their tiles where those are encoded ahead."""
        if self.first_chunk.encodes_ahead:
            known = list(micro_batches)
            self.vision = SpreadVision(self.first_chunk, known, device)
            # Pixels have done their work.
            without_tiles = (replace(micro_batch, tiles=micro_batch.tiles[:0]) for micro_batch in known)
            with NamedRange(VISION):
                self.work = zip(without_tiles, self.vision.encode(), strict=True)

        if not self.first_chunk.pre_process and len(models) == 1:
            # Shapes of what comes from the stage before are known a micro-batch ahead; the first stage receives none.
            self.work, upcoming = tee(self.work)
            shapes: Iterator[Shape] = (self.first_chunk.payload_shape(micro_batch) for micro_batch, _ in upcoming)
        else:
            shapes = iter(())
        self.first_chunk.config.message_shapes = MessageShapes(shapes)

    def __call__(self, work: Iterator[tuple[MicroBatch, Tensor | None]], module: Any) -> tuple[Tensor, Any]:
        """What core's schedules call for each micro-batch and chunk."""
        micro_batch, features = next(work)
        self.on_micro_batch(micro_batch.keys)
        if module is self.first_model:  # every chunk sees the micro-batch
            self.tokens += len(micro_batch.tokens)
            self.tiles += micro_batch.num_tiles
            self.keys.append(micro_batch.keys)
            self.adjustments.update(micro_batch.adjustments)
            unknown = (0,) * len(micro_batch.keys)
            tiles = micro_batch.sample_tiles or unknown
            self.samples += zip(micro_batch.datasets or unknown, (count > 0 for count in tiles), strict=True)
        micro_batch = micro_batch.to(self.device)
        if features is not None:
            features = features.to(self.device, non_blocking=True)
        return module(micro_batch, features, with_loss=True), partial(loss_function, micro_batch)

    def run(
        self, models: list[DistributedDataParallel], num_micro_batches: int, forward_only: bool = False
    ) -> list[dict[str, Tensor]]:
        """All micro-batches through core's schedule; returns the reports of `loss_function` on the last stage."""
        single = len(models) == 1
        reports: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=self,
            data_iterator=self.work if single else list(tee(self.work, len(models))),
            model=models[0] if single else models,
            num_microbatches=num_micro_batches,
            # Of effect between interleaved stages only; elsewhere shapes travel with the tensors (variable_seq_lengths).
            seq_length=self.first_chunk.payload_tokens or 1,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return reports

    def read(self, reports: list[dict[str, Tensor]], norm: Tensor | float | None = None) -> "_Numbers":
        """What a step has to tell, by one copy to the host: it waits there until all work so far is done."""
        norm = torch.zeros((), device=self.device) if norm is None else torch.as_tensor(norm, device=self.device)
        parts = [norm.double()[None]]
        if reports:
            parts.append(torch.stack([report["loss"] for report in reports]).sum(0))
            parts += [report["samples"].T.flatten() for report in reports]
        values = torch.cat(parts).tolist()
        if not reports:
            return _Numbers(values[0], 0.0, 0.0, ())
        sums = zip(*(values[start::3] for start in (3, 4, 5)), strict=True)
        samples = tuple(
            SampleLoss(dataset, has_images, loss_sum, int(targets), int(right))
            for (dataset, has_images), (loss_sum, targets, right) in zip(self.samples, sums, strict=True)
        )
        return _Numbers(values[0], values[1], values[2], samples)


def run_step(
    models: list[DistributedDataParallel],
    micro_batches: Iterator[MicroBatch],
    num_micro_batches: int,
    device: torch.device,
    optimizer: MegatronOptimizer | None,
    on_micro_batch: Callable[[tuple[str, ...]], None] = lambda keys: None,
    judge: Judge | None = None,
) -> StepResult:
    """Forward, backward and, with an optimizer, update; without one the gradients stay in `main_grad`.

    Args:
        models: the chunks of this rank's stage, as `wrap_model` returns them.
        on_micro_batch: told the names of the samples as each micro-batch begins.
        judge: asked before the update; without it every update is made.
    """
    clock = DeviceClock()
    clock.start()
    steps = _ForwardSteps(models, micro_batches, device, on_micro_batch)
    for model in models:
        model.module.config.finalize_model_grads_func = partial(finalize_gradients, vision=steps.vision, clock=clock)
        model.zero_grad_buffer()
    if optimizer is not None:
        optimizer.zero_grad()
    reports = steps.run(models, num_micro_batches)
    numbers, norm, skipped = None, None, ""
    if optimizer is not None and judge is not None:
        # Norms are made twice, since core's step would go on to the update.
        optimizer.prepare_grads()
        numbers = steps.read(reports, optimizer.get_grad_norm())
        skipped = judge(numbers.loss_sum, numbers.num_targets, numbers.grad_norm)
    if optimizer is not None and not skipped:
        with NamedRange(OPTIMIZER):
            _, norm, _ = optimizer.step()
    numbers = numbers or steps.read(reports, norm)  # behind everything: the host waits once a step
    encoded_tiles, vision_seconds = steps.first_chunk.vision_clock.take()
    return StepResult(
        loss_sum=numbers.loss_sum,
        num_targets=numbers.num_targets,
        grad_norm=numbers.grad_norm,
        tokens=steps.tokens,
        tiles=steps.tiles,
        keys=tuple(steps.keys),
        adjustments=steps.adjustments,
        encoded_tiles=encoded_tiles,
        vision_seconds=vision_seconds,
        own_seconds=clock.take_seconds(),
        skipped=skipped,
        samples=numbers.samples,
    )


def evaluate_step(
    models: list[DistributedDataParallel],
    micro_batches: Iterator[MicroBatch],
    num_micro_batches: int,
    device: torch.device,
    on_micro_batch: Callable[[tuple[str, ...]], None] = lambda keys: None,
) -> tuple[SampleLoss, ...]:
    """Forward pass alone, through the same schedule as a step's; the models must be in evaluation mode (`eval()`).

    Returns:
        Samples of this replica, in order; nothing before the last pipeline stage.
    """
    with torch.no_grad():
        steps = _ForwardSteps(models, micro_batches, device, on_micro_batch)
        reports = steps.run(models, num_micro_batches, forward_only=True)
    steps.first_chunk.vision_clock.take()  # what it counted is no part of the next step
    return steps.read(reports).samples
