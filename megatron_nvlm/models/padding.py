"""The encoder's attention under tensor parallelism: InternViT-6B has 25 heads, which 2, 4 or 8 ranks cannot share.

Heads of zeros fill up to the next multiple. They stay zero: their values are zero, so nothing that they do reaches the
output, and their gradients are zero too. Norms over all heads divide by the real width. Checkpoints hold the real heads
alone, each as a piece of the whole tensor, so that every placement of the encoder reads what any other wrote.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """How many of the heads are real."""

    real: int
    padded: int
    """A multiple of the tensor-parallel ranks."""

    def pad(self, full: Tensor, dim: int) -> Tensor:
        """Zeros after the real heads along `dim`."""
        missing = list(full.shape)
        missing[dim] = full.shape[dim] // self.real * (self.padded - self.real)
        return torch.cat([full, full.new_zeros(missing)], dim)

    def unpad(self, padded: Tensor, dim: int) -> Tensor:
        """The inverse of `pad`."""
        return padded.narrow(dim, 0, padded.shape[dim] // self.padded * self.real)


def pad_evenly(heads: int, ranks: int) -> Padding:
    """The fewest heads that the ranks can share evenly."""
    return Padding(heads, -(-heads // ranks) * ranks)


class _SumOverRanks(torch.autograd.Function):
    """A sum of which every rank uses the whole, so that its gradient is a sum over ranks as well."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class SplitRMSNorm(torch.nn.Module):
    """RMSNorm over the heads of all tensor-parallel ranks together; zeros of padded heads do not count.

    Args:
        width: channels of the real heads. local_width: channels of this rank's heads, padded ones included.
    """

    def __init__(
        self, config: TransformerConfig, width: int, local_width: int, eps: float, group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self.width, self.eps, self.group = width, eps, group
        self.weight = torch.nn.Parameter(torch.ones(local_width, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[p, t, this rank's channels], normalised by the mean square over the channels of all ranks."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares: Tensor = _SumOverRanks.apply(wide.square().sum(-1, keepdim=True), self.group)  # [p, t, 1]
        return (wide * torch.rsqrt(squares / self.width + self.eps) * self.weight).to(x.dtype)


def shard_heads(
    whole: ShardedTensor, dim: int, padding: Padding, rank: int, ranks: int, replica: int
) -> ShardedTensorFactory:
    """How a rank's part of a tensor split by heads along `dim` is kept: a piece for each real head, none for the others.

    Args:
        whole: core's description of the part, of which key and data count.
        replica: this rank among those that hold the same part.
    """
    heads_here = padding.padded // ranks
    first = rank * heads_here
    real_here = max(0, min(heads_here, padding.real - first))
    size = whole.data.shape[dim] // heads_here
    template = whole.data

    def build(key: str, data: Tensor, replica_id: Any, flattened_range: slice | None) -> dict[str, ShardedTensor]:
        if not real_here:
            # Core forgets entries without pieces. A copy of another rank's head, never the one that is saved, holds the
            # place; what is loaded into it is thrown away.
            place = data.narrow(dim, 0, size).clone()
            offset = (dim, padding.real - 1, padding.real)
            return {"place": ShardedTensor.from_rank_offsets(key, place, offset, replica_id=(0, 1 + rank, replica))}
        return {
            f"head_{first + head}": ShardedTensor.from_rank_offsets(
                key,
                data.narrow(dim, head * size, size),
                (dim, first + head, padding.real),
                replica_id=replica_id,
            )
            for head in range(real_here)
        }

    def merge(pieces: dict[str, Tensor]) -> Tensor:
        shape = list(template.shape)
        shape[dim] = (heads_here - real_here) * size
        read = [pieces[f"head_{first + head}"] for head in range(real_here)]
        like = read[0] if read else template
        return torch.cat([*read, like.new_zeros(shape)], dim)

    return ShardedTensorFactory(whole.key, whole.data, build, merge, replica_id=(0, 0, replica))


def shard_evenly(whole: ShardedTensor, dim: int | None, rank: int, ranks: int, replica: int) -> ShardedTensor:
    """A rank's part of a tensor split evenly along `dim`, or its copy of one that is not split (`dim` None)."""
    if dim is None:
        return replace(whole, replica_id=(0, rank, replica))
    return ShardedTensor.from_rank_offsets(whole.key, whole.data, (dim, rank, ranks), replica_id=(0, 0, replica))
