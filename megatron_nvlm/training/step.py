"""One step: forward and backward of all micro-batches, gradients over all ranks, one update."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.ops.vocab_cross_entropy import vocab_cross_entropy
from megatron_nvlm.sequence.micro_batch import MicroBatch


@dataclass(frozen=True)
class StepResult:
    """What a step did on this rank; the loss is known on the last pipeline stage only (0 elsewhere)."""

    loss_sum: float
    num_targets: float
    grad_norm: float
    rows: int
    tiles: int
    keys: tuple[tuple[str, ...], ...]
    """Of the samples of each micro-batch of this rank."""


def wrap_model(model: NVLMModel, use_distributed_optimizer: bool) -> DistributedDataParallel:
    """The model with gradient buffers, summed over data-parallel ranks and divided by the targets of the global batch."""
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=use_distributed_optimizer,
        grad_reduce_in_fp32=model.config.params_dtype == torch.bfloat16,
        average_in_collective=False,
    )
    model.config.finalize_model_grads_func = finalize_gradients
    return DistributedDataParallel(model.config, config, model)


def finalize_gradients(models: list[Any], num_targets: Tensor | None = None, **kwargs: Any) -> None:
    """Core's reductions, then the sum over tensor-parallel ranks of what each rank has a part of.

    That is the gradient of an encoder whose tiles are shared out, and of norms that serve each rank's own heads.
    """
    finalize_model_grads(models, num_targets, **kwargs)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    partial_gradients = [
        parameter.main_grad
        for model in models
        for parameter in model.parameters()
        if parameter.requires_grad and getattr(parameter, "sum_over_tensor_parallel", False)
    ]
    if not partial_gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in partial_gradients])
    dist.all_reduce(flat, group=group)
    offset = 0
    for gradient in partial_gradients:
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
    model: DistributedDataParallel,
    micro_batches: Iterator[MicroBatch],
    num_micro_batches: int,
    device: torch.device,
    optimizer: MegatronOptimizer | None,
) -> StepResult:
    """Forward, backward and, with an optimizer, update; without one the gradients stay in `main_grad`."""
    rows = tiles = 0
    keys: list[tuple[str, ...]] = []

    def forward_step(iterator: Iterator[MicroBatch], module: Any) -> tuple[Tensor, Any]:
        nonlocal rows, tiles
        micro_batch = next(iterator).to(device)
        rows += len(micro_batch.tokens)
        tiles += len(micro_batch.tiles)
        keys.append(micro_batch.keys)
        return module(micro_batch), partial(loss_function, micro_batch)

    model.zero_grad_buffer()
    if optimizer is not None:
        optimizer.zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=micro_batches,
        model=model,
        num_microbatches=num_micro_batches,
        seq_length=1,  # of no effect: shapes travel with the tensors (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=False,
    )
    grad_norm = 0.0
    if optimizer is not None:
        _, norm, _ = optimizer.step()
        grad_norm = float(norm) if norm is not None else 0.0
    total = torch.stack([report["loss"] for report in reports]).sum(0).tolist() if reports else [0.0, 0.0]
    return StepResult(total[0], total[1], grad_norm, rows, tiles, tuple(keys))
