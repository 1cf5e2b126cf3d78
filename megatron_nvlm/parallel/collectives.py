"""What single ranks of a model replica have found, made known to all of them."""

from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

Item = TypeVar("Item")


def gather_found(items: list[Item], device: torch.device) -> list[Item]:
    """Items of all tensor x pipeline ranks, in rank order; every rank of the replica calls it.

    A number is summed first, so that without any item no objects travel.
    """
    group = parallel_state.get_model_parallel_group()
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return items
    count = torch.tensor([len(items)], device=device)
    dist.all_reduce(count, group=group)
    if not int(count):
        return []
    everyone: list[list[Item]] = [[]] * ranks
    dist.all_gather_object(everyone, items, group=group)
    return [item for found in everyone for item in found]
