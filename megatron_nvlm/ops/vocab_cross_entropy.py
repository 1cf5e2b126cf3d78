"""Cross-entropy over a vocabulary that is split across the ranks of a process group.

Unlike Megatron-core's form it keeps the precision of float64 inputs (tests compare layouts in float64) and computes in
float32 otherwise.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))  # [tokens, columns]
        columns = scores.shape[-1]
        largest = scores.max(dim=-1).values  # [tokens]
        if size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        scores = scores - largest[:, None]
        local = labels - rank * columns
        ours = (local >= 0) & (local < columns)
        local = local.clamp(0, columns - 1)
        exponentials = scores.exp()
        sums = exponentials.sum(dim=-1)  # [tokens]
        target = scores.gather(1, local[:, None])[:, 0] * ours  # [tokens]
        if size > 1:
            both = torch.stack([sums, target])  # [2, tokens]
            dist.all_reduce(both, group=group)
            sums, target = both[0], both[1]
        ctx.save_for_backward(exponentials.div_(sums[:, None]), local, ours)
        ctx.logits_dtype = logits.dtype
        return sums.log() - target  # [tokens]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        probabilities, local, ours = ctx.saved_tensors  # [tokens, columns], [tokens], [tokens]
        gradient = probabilities.clone()
        gradient.scatter_add_(1, local[:, None], -ours.to(gradient.dtype)[:, None])
        return (gradient * gradients[0][:, None]).to(ctx.logits_dtype), None, None


def vocab_cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Cross-entropy of each token, in nats.

    Args:
        logits: [tokens, vocabulary / ranks], this rank's columns.
        labels: [tokens] ids in the whole vocabulary.
        group: the ranks that share the vocabulary, in order; None for one process.

    Returns:
        [tokens], equal on all ranks of the group; float32, or float64 for float64 logits.
    """
    loss: Tensor = _VocabCrossEntropy.apply(logits, labels, group)
    return loss
