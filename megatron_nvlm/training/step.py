"""One step: forward and backward of all micro-batches, gradients over all ranks, one update."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import tee
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_nvlm.models.chunks import ModelChunks, chunks_of
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.precision import Precision
from megatron_nvlm.ops.vocab_cross_entropy import vocab_cross_entropy
from megatron_nvlm.parallel.vision_ahead import SpreadVision
from megatron_nvlm.sequence.micro_batch import MicroBatch


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
    encoded_tiles: int
    """Of the tiles, by this rank."""
    vision_seconds: float
    """In the encoder and, where tiles of the step are shared, until all features are in place."""


def wrap_model(
    model: NVLMModel | ModelChunks, precision: Precision, use_distributed_optimizer: bool
) -> list[DistributedDataParallel]:
    """The chunks with gradient buffers, summed over data-parallel ranks and divided by the targets of the global batch."""
    chunks = chunks_of(model)
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=use_distributed_optimizer,
        grad_reduce_in_fp32=precision.gradient_dtype != precision.parameter_dtype,
        average_in_collective=False,
        # One bucket a buffer: with several, core (0.16.1 to 0.19.2) saves the moments of most parameters shifted by the
        # padding between buckets, without an error; mended upstream after 0.19 (Megatron-LM #5077).
        overlap_grad_reduce=False,
    )
    return [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]


def finalize_gradients(
    models: list[Any], num_targets: Tensor | None = None, vision: SpreadVision | None = None, **kwargs: Any
) -> None:
    """Core's reductions, and around them what it does not know of.

    Before: gradients of an encoder that worked ahead of the pipeline. Behind: sums over ranks of what each has a part of,
    the gradient of an encoder whose tiles are shared out, and of norms that serve each rank's own heads.
    """
    if vision is not None:
        vision.backward()
    finalize_model_grads(models, num_targets, **kwargs)
    _sum_over(parallel_state.get_tensor_model_parallel_group(), models, "sum_over_tensor_parallel")
    _sum_over(parallel_state.get_model_parallel_group(), models, "sum_over_model_parallel")


def _sum_over(group: dist.ProcessGroup, models: list[Any], mark: str) -> None:
    """Sum the gradients of the parameters with that mark."""
    if group.size() == 1:
        return
    gradients = [
        parameter.main_grad
        for model in models
        for parameter in model.parameters()
        if parameter.requires_grad and getattr(parameter, mark, False)
    ]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def loss_function(micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses of the targets and their number; core divides once, by the number in the global batch."""
    losses = vocab_cross_entropy(
        logits, micro_batch.labels.clamp(min=0), parallel_state.get_tensor_model_parallel_group()
    )
    loss_sum = (losses * micro_batch.loss_mask.to(losses.dtype)).sum()
    num_targets = micro_batch.loss_mask.sum()
    report = torch.stack([loss_sum.detach().double(), num_targets.double()])
    return loss_sum, num_targets.to(torch.int), {"loss": report}


def run_step(
    models: list[DistributedDataParallel],
    micro_batches: Iterator[MicroBatch],
    num_micro_batches: int,
    device: torch.device,
    optimizer: MegatronOptimizer | None,
    on_micro_batch: Callable[[tuple[str, ...]], None] = lambda keys: None,
) -> StepResult:
    """Forward, backward and, with an optimizer, update; without one the gradients stay in `main_grad`.

    Args:
        models: the chunks of this rank's stage, as `wrap_model` returns them.
        on_micro_batch: told the names of the samples as each micro-batch begins.
    """
    tokens = tiles = 0
    keys: list[tuple[str, ...]] = []
    first_chunk: NVLMModel = models[0].module
    vision = None
    work: Iterator[tuple[MicroBatch, Tensor | None]] = ((micro_batch, None) for micro_batch in micro_batches)
    if first_chunk.encodes_ahead:
        known = list(micro_batches)
        vision = SpreadVision(first_chunk, known, device)
        work = zip(known, vision.encode(), strict=True)
    for model in models:
        model.module.config.finalize_model_grads_func = partial(finalize_gradients, vision=vision)

    def forward_step(iterator: Iterator[tuple[MicroBatch, Tensor | None]], module: Any) -> tuple[Tensor, Any]:
        nonlocal tokens, tiles
        micro_batch, features = next(iterator)
        on_micro_batch(micro_batch.keys)
        if module is models[0]:  # every chunk sees the micro-batch
            tokens += len(micro_batch.tokens)
            tiles += micro_batch.num_tiles
            keys.append(micro_batch.keys)
        if vision is not None:  # pixels have done their work
            micro_batch = replace(micro_batch, tiles=micro_batch.tiles[:0])
        micro_batch = micro_batch.to(device)
        if features is not None:
            features = features.to(device)
        return module(micro_batch, features=features), partial(loss_function, micro_batch)

    for model in models:
        model.zero_grad_buffer()
    if optimizer is not None:
        optimizer.zero_grad()
    single = len(models) == 1
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=work if single else list(tee(work, len(models))),
        model=models[0] if single else models,
        num_microbatches=num_micro_batches,
        # Of effect between interleaved stages only; elsewhere shapes travel with the tensors (variable_seq_lengths).
        seq_length=first_chunk.payload_tokens or 1,
        micro_batch_size=1,
        forward_only=False,
    )
    grad_norm = 0.0
    if optimizer is not None:
        _, norm, _ = optimizer.step()
        grad_norm = float(norm) if norm is not None else 0.0
    total = torch.stack([report["loss"] for report in reports]).sum(0).tolist() if reports else [0.0, 0.0]
    encoded_tiles, vision_seconds = first_chunk.vision_clock.take()
    return StepResult(total[0], total[1], grad_norm, tokens, tiles, tuple(keys), encoded_tiles, vision_seconds)
