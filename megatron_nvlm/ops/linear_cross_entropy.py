"""Output layer and cross entropy in one operation, over a vocabulary split across the ranks of a process group.

Logits exist for one chunk of rows at a time. Their gradient is made at once, while they are there, and turned into the
gradients of hidden states and weight; so the backward pass only scales. Every sum has one order: two runs give equal bits.
Shapes: r rows, h hidden, v columns of this rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nvlm.ops.dispatch import runs_kernel

CHUNK_ELEMENTS = 2**27
"""Most logits at a time, as long as a chunk has 256 rows: 256 MB in bfloat16."""
_LEAST_ROWS = 256


@dataclass(frozen=True)
class VocabularyPart:
    """The columns of this rank.

    Args:
        group: ranks that share the vocabulary, in order; None for one process.
        real: columns of this rank that stand for an id; the rest is padding and takes no share.
    """

    group: dist.ProcessGroup | None
    real: int

    def first(self, columns: int) -> int:
        """Id of this rank's first column."""
        return 0 if self.group is None else dist.get_rank(self.group) * columns

    def reduce(self, values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        """All-reduce in place."""
        if self.group is not None and dist.get_world_size(self.group) > 1:
            dist.all_reduce(values, op=operation, group=self.group)
        return values


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, part: VocabularyPart, wants: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        rows = max(_LEAST_ROWS, CHUNK_ELEMENTS // max(len(weight), 1))
        chunks = list(zip(hidden.split(rows), labels.split(rows), strict=True)) if len(hidden) else []
        losses: list[Tensor] = []
        of_hidden: list[Tensor] = []
        of_weight: Tensor | None = None
        for chunk, targets in chunks:
            loss, gradient = _rows_loss(chunk @ weight.T, targets, part, any(wants))
            losses.append(loss)
            if wants[0]:
                of_hidden.append(gradient @ weight)
            if wants[1]:
                product = gradient.T @ chunk  # [v, h]
                if of_weight is None:
                    of_weight = product if len(chunks) == 1 else product.to(loss.dtype)
                else:
                    of_weight += product
        kept = [
            (torch.cat(of_hidden) if of_hidden else torch.zeros_like(hidden)) if wants[0] else None,
            (torch.zeros_like(weight) if of_weight is None else of_weight.to(weight.dtype)) if wants[1] else None,
        ]
        ctx.save_for_backward(*kept)
        each = torch.cat(losses) if losses else hidden.new_zeros(0, dtype=_loss_dtype(hidden))
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        scaled = [None if one is None else one * gradients[0].to(one.dtype) for one in ctx.saved_tensors]
        return scaled[0], scaled[1], None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, part: VocabularyPart | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of rows, in nats, and each row's without a gradient.

    The gradient of `hidden` is this rank's part: the caller sums it over the ranks of the vocabulary.

    Args:
        hidden: [r, h], whole on every rank; r may be 0.
        weight: [v, h], this rank's columns of the output layer.
        labels: [r] ids in the whole vocabulary.
        part: which columns they are; None for all, in one process.

    Returns:
        Scalar and [r], equal on all ranks; float32, or float64 for float64 inputs.
    """
    part = part or VocabularyPart(None, len(weight))
    wants = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    total, each = _LinearCrossEntropy.apply(hidden, weight, labels, part, wants)
    return total, each


@torch.no_grad()
def score_rows(
    hidden: Tensor, weight: Tensor, labels: Tensor, part: VocabularyPart | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row, and whether its label is the most likely id; for evaluation, without a gradient.

    Arguments as of `linear_cross_entropy`. Of equally likely ids the first counts, as greedy decoding takes it.

    Returns:
        [r] and bool [r], equal on all ranks.
    """
    part = part or VocabularyPart(None, len(weight))
    rows = max(_LEAST_ROWS, CHUNK_ELEMENTS // max(len(weight), 1))
    losses, right = [hidden.new_zeros(0, dtype=_loss_dtype(hidden))], [labels.new_zeros(0, dtype=torch.bool)]
    for chunk, targets in zip(hidden.split(rows), labels.split(rows), strict=True) if len(hidden) else []:
        logits = chunk @ weight.T  # [r, v]
        right.append(_most_likely(logits, part) == targets)  # first, since a kernel may write over logits
        losses.append(_rows_loss(logits, targets, part, with_gradient=False)[0])
    return torch.cat(losses), torch.cat(right)


def _most_likely(logits: Tensor, part: VocabularyPart) -> Tensor:
    """Id [r] of the largest logit of the whole vocabulary; of several, the first."""
    if part.real:
        largest, columns = logits[:, : part.real].max(dim=-1).values, logits[:, : part.real].argmax(dim=-1)
    else:  # a rank whose columns are all padding
        largest = logits.new_full((len(logits),), -torch.inf)
        columns = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    whole = part.reduce(largest.clone(), dist.ReduceOp.MAX)
    ids = torch.where(largest == whole, columns + part.first(logits.shape[1]), torch.iinfo(torch.int64).max)
    return part.reduce(ids, dist.ReduceOp.MIN)


def _loss_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _rows_loss(logits: Tensor, labels: Tensor, part: VocabularyPart, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Losses [r] of logits [r, v], and the gradient [r, v] of their sum, in the logits' dtype."""
    first = part.first(logits.shape[1])
    if runs_kernel(logits):
        from megatron_nvlm.ops.triton.softmax_rows import gradient_in_place, row_statistics

        largest, total, target = row_statistics(logits, labels, first, part.real)
        whole_largest, whole_total, target = _over_ranks(largest, total, target, part)
        losses = whole_total.log() + whole_largest - target
        if with_gradient:
            gradient_in_place(logits, labels, whole_largest, whole_total, first, part.real)
        return losses, logits
    scores = logits[:, : part.real].to(_loss_dtype(logits))  # [r, real]
    local = labels - first
    here = (local >= 0) & (local < part.real)
    local = local.clamp(0, max(part.real - 1, 0))[:, None]  # [r, 1]
    if part.real:
        largest = scores.max(dim=-1).values  # [r]
        shares = (scores - largest[:, None]).exp_()  # [r, real]
        target = scores.gather(1, local)[:, 0] * here
    else:  # a rank whose columns are all padding
        largest = scores.new_full((len(scores),), -torch.inf)
        shares, target = scores, scores.new_zeros(len(scores))
    whole_largest, whole_total, target = _over_ranks(largest, shares.sum(dim=-1), target, part)
    losses = whole_total.log() + whole_largest - target
    if not with_gradient:
        return losses, logits
    shares *= ((largest - whole_largest).exp() / whole_total)[:, None]
    if part.real:
        shares.scatter_add_(1, local, -here.to(shares.dtype)[:, None])
    padding = logits.shape[1] - part.real
    gradient = torch.nn.functional.pad(shares, (0, padding)) if padding else shares
    return losses, gradient.to(logits.dtype)


def _over_ranks(largest: Tensor, total: Tensor, target: Tensor, part: VocabularyPart) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of whole rows from those of each rank's columns; each [r]."""
    whole = part.reduce(largest.clone(), dist.ReduceOp.MAX)
    both = part.reduce(torch.stack([total * (largest - whole).exp(), target]))  # [2, r]
    return whole, both[0], both[1]
