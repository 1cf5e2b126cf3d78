"""Causal self-attention over a ragged sequence of samples, without attention between samples."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Sequence[int],
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention inside each sample of a ragged sequence.

    Args:
        query: [tokens, heads, head_dim]; key, value: [tokens, groups, head_dim].
        boundaries: those of the samples, from 0 to tokens; on the host, so that nothing waits for the device.
        scale: factor of the scores; head_dim ** -0.5 by default.
        dropout: probability with which an attention weight is dropped.

    Returns:
        [tokens, heads, head_dim].
    """
    starts, ends = boundaries[:-1], boundaries[1:]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    longest = max(lengths)
    # Samples of similar length run as one padded batch (padding stands after the real tokens, so no real token sees it);
    # otherwise padding would cost more than a loop.
    # On CUDA a loop costs launches alone, and a batch's indices would have to be copied there.
    if not query.is_cuda and len(lengths) > 1 and longest * len(lengths) <= 2 * sum(lengths):
        return _padded_batch(query, key, value, boundaries, longest, scale, dropout)
    outputs = [
        _causal(query[start:end][None], key[start:end][None], value[start:end][None], scale, dropout)[0]
        for start, end in zip(starts, ends, strict=True)
        if end > start
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]  # [tokens, heads, head_dim]


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Query [b, s, n, d], key and value [b, s, g, d] -> [b, s, n, d]."""
    output = scaled_dot_product_attention(
        query.transpose(1, 2),  # [b, n, s, d]
        key.transpose(1, 2),  # [b, g, s, d]
        value.transpose(1, 2),  # [b, g, s, d]
        dropout_p=dropout,
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return output.transpose(1, 2)  # [b, s, n, d]


def _padded_batch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Sequence[int],
    longest: int,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """All samples in one call; b samples of l tokens each, padding included."""
    bounds = torch.tensor(boundaries, device=query.device)
    starts = bounds[:-1]  # [b]
    lengths = bounds[1:] - starts  # [b]
    position = torch.arange(longest, device=query.device)  # [l]
    real = position[None] < lengths[:, None]  # [b, l]
    rows = (starts[:, None] + position[None]).clamp(max=query.shape[0] - 1)  # [b, l]
    output = _causal(query[rows], key[rows], value[rows], scale, dropout)  # [b, l, n, d]
    return output[real]  # [tokens, n, d]
