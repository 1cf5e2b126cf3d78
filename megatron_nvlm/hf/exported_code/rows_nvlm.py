"""What is computed of rows, whatever model they pass: their positions, and their loss."""

from typing import Any

import torch
from torch import Tensor, nn


def positions_of(attention_mask: Tensor | None, here: slice, rows: Tensor) -> Tensor:
    """[b, r] positions that start at 0 in each sample's first row that is no padding."""
    if attention_mask is None:
        return torch.arange(here.start, here.stop, device=rows.device).expand(len(rows), -1)
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, here]


def loss_of(logits: Tensor, labels: Tensor, targets: int | Tensor | None = None) -> Tensor:
    """Mean over targets of the cross-entropy of the next token, in at least float32.

    Args:
        targets: number to divide by; None for that of the labels.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels have shape {list(labels.shape)} and the logits are of rows {list(logits.shape[:2])}")
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    how = "mean" if targets is None else "sum"
    loss = nn.functional.cross_entropy(wide.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction=how)
    return loss if targets is None else loss / torch.as_tensor(targets, device=loss.device)


def cover_rows(inputs: dict[str, Any], rows: int) -> None:
    """Tensors over rows are those of the prompt: rows after it are text that sees in the context what its last row sees."""
    intervals, index = inputs.get("context_intervals"), inputs.get("vision_index")
    if intervals is not None and intervals.shape[1] < rows:
        more = intervals[:, -1:].expand(-1, rows - intervals.shape[1], -1)
        inputs["context_intervals"] = torch.cat([intervals, more], dim=1)
    if index is not None and index.shape[1] < rows:
        inputs["vision_index"] = nn.functional.pad(index, (0, rows - index.shape[1]), value=-1)
