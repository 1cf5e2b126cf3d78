"""One pass of tokens through the pipeline stages of a model that only answers: what core's schedules do for training.

All stages know how many tokens travel, so a message needs no header.
Shapes: s tokens, h hidden.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nvlm.models.nvlm_model import NVLMModel

Sent = TypeVar("Sent")


def pass_through(model: NVLMModel, num_tokens: int, compute: Callable[[Tensor | None], Tensor]) -> Tensor | None:
    """Receive from the stage before, compute, send to the stage after.

    Args:
        num_tokens: of the message between stages, over all sequence shards.
        compute: this stage's part: message of the stage before (None on the first) -> message [s, 1, h], or logits on the
            last.

    Returns:
        What the last stage computed, on its ranks; None on the others.
    """
    group = model.language_model.pg_collection.pp
    stage, stages = group.rank(), group.size()
    message = None
    if stage > 0:
        config = model.config
        shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
        device = next(model.parameters()).device
        message = torch.empty(num_tokens // shards, 1, config.hidden_size, dtype=config.params_dtype, device=device)
        dist.recv(message, src=dist.get_global_rank(group, stage - 1), group=group)
    output = compute(message)
    if stage == stages - 1:
        return output
    dist.send(output.contiguous(), dst=dist.get_global_rank(group, stage + 1), group=group)
    return None


def from_last_stage(model: NVLMModel, value: Sent | None) -> Sent:
    """What the last stage has, on every stage (whose own value is None)."""
    group = model.language_model.pg_collection.pp
    box = [value]
    if group.size() > 1:
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, group.size() - 1), group=group)
    assert box[0] is not None
    return box[0]
