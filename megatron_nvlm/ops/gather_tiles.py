"""Sharing tiles among the ranks of a group: who encodes which, and how the features come together."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def share_of(num_tiles: int, ranks: int, rank: int) -> tuple[int, int]:
    """The range [start, end) of tiles that a rank encodes; shares differ by one tile at most."""
    return num_tiles * rank // ranks, num_tiles * (rank + 1) // ranks


class _GatherTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, num_tiles: int, group: dist.ProcessGroup) -> Tensor:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        ctx.own = share_of(num_tiles, ranks, rank)
        # Equal sizes for the collective: shares differ by one tile at most, and the last may be empty.
        most = -(-num_tiles // ranks)
        padded = features.new_zeros(most, *features.shape[1:])  # [most, ...]
        padded[: len(features)] = features
        gathered = features.new_empty(ranks * most, *features.shape[1:])  # [ranks * most, ...]
        dist.all_gather_into_tensor(gathered, padded, group=group)
        parts = []
        for other in range(ranks):
            start, end = share_of(num_tiles, ranks, other)
            parts.append(gathered[other * most : other * most + end - start])
        return torch.cat(parts)  # [num_tiles, ...]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        start, end = ctx.own
        return gradients[0][start:end].contiguous(), None, None  # [this rank's tiles, ...]


def gather_tiles(features: Tensor, num_tiles: int, group: dist.ProcessGroup) -> Tensor:
    """Features of all tiles on every rank, from each rank's share.

    The gradient of the result must be the same on all ranks (as after a tensor-parallel projector); each rank then
    receives that of its own share, and gradients of the encoder are sums over the ranks.

    Args:
        features: [this rank's tiles, ...], the share that `share_of` names.
        num_tiles: tiles of all ranks together; more than 0.

    Returns:
        [num_tiles, ...] in tile order.
    """
    result: Tensor = _GatherTiles.apply(features, num_tiles, group)
    return result
