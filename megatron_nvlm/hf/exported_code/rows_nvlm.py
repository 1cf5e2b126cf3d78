"""What is computed of rows, whatever model they pass: their positions, and their loss."""

import torch
from torch import Tensor, nn


def positions_of(attention_mask: Tensor | None, here: slice, rows: Tensor) -> Tensor:
    """[b, r] positions that start at 0 in each sample's first row that is no padding."""
    if attention_mask is None:
        return torch.arange(here.start, here.stop, device=rows.device).expand(len(rows), -1)
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, here]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over targets of the cross-entropy of the next token, in at least float32."""
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels have shape {list(labels.shape)} and the logits are of rows {list(logits.shape[:2])}")
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
