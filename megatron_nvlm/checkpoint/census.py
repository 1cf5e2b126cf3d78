"""Whether a checkpoint's weights all have a place in the model that loads them.

Core refuses a model that wants more than the checkpoint has, and passes over what it wants less.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_nvlm.errors import UserError

_OPTIMIZER = "optimizer"
"""What names of the optimizer's state begin with."""


def refuse_unused_weights(path: Path, model_state: dict[str, Any]) -> None:
    """Raise UserError if the checkpoint holds weights that no rank's part of the model takes; every rank calls it.

    Args:
        model_state: the model's `sharded_state_dict`, of this rank.
    """
    taken: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(taken, set(_keys(model_state)))
    stored = [_weights(path) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(stored, src=0)
    unused = sorted(set(stored[0]) - set().union(*taken))
    if unused:
        raise UserError(
            f"the checkpoint {path} holds {len(unused)} weights that this model has no place for, {unused[0]} first; set "
            "section model (model.cross_attention.interval and offset decide which layers have cross-attention) as it was "
            f"when the checkpoint was written: {path.parent.parent / 'config.yaml'} has it"
        )


def _keys(state: Any) -> Iterator[str]:
    if isinstance(state, ShardedBase):
        yield state.key
    elif isinstance(state, dict):
        for value in state.values():
            yield from _keys(value)


def _weights(path: Path) -> list[str]:
    """Names of the tensors of a checkpoint, the optimizer's left out."""
    try:
        metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception:  # a damaged folder; the load that follows says so
        return []
    return [
        name
        for name, kind in metadata.items()
        if isinstance(kind, TensorStorageMetadata) and not name.startswith(_OPTIMIZER)
    ]
