"""Attention in which each query token sees one contiguous range of keys.

A range per token describes every mask of NVLM-X and NVLM-H (docs/design: "one interval per token"), for ragged tiles,
several images and packed samples, without padding. This is the readable form that runs everywhere and that kernels are
compared with.

Example, 5 query tokens and 6 keys (two tiles of 3 tokens)::

    intervals   row of the mask
    [0, 0)      ......        text before the image: sees nothing, output exactly 0
    [0, 3)      xxx...        the tag of tile 1
    [3, 6)      ...xxx        the tag of tile 2
    [0, 6)      xxxxxx        text after the image
    [0, 6)      xxxxxx
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def interval_mask(intervals: Tensor, num_keys: int) -> Tensor:
    """The ranges as a dense mask: [tokens, num_keys], true where the token sees the key. `intervals` is [tokens, 2]."""
    position = torch.arange(num_keys, device=intervals.device)  # [num_keys]
    return (position >= intervals[:, :1]) & (position < intervals[:, 1:])


def interval_attention(
    query: Tensor, key: Tensor, value: Tensor, intervals: Tensor, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention of each token over its own range of keys; a token with an empty range is exactly zero.

    Args:
        query: [tokens, heads, head_dim].
        key, value: [keys, groups, head_dim]; `heads` is a multiple of `groups` (grouped-query attention).
        intervals: [tokens, 2] integers, the range [start, end) of keys that the token sees.
        scale: factor of the scores; head_dim ** -0.5 by default.
        dropout: probability with which an attention weight is dropped.

    Returns:
        [tokens, heads, head_dim].
    """
    if key.shape[0] == 0:
        return query * 0
    outputs = [
        _attend(query[first:last], key[start:end], value[start:end], intervals[first:last] - start, scale, dropout)
        for first, last, start, end in segments(intervals)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]  # [tokens, heads, head_dim]


def segments(intervals: Tensor) -> list[tuple[int, int, int, int]]:
    """Cut the tokens where no later token sees a key that an earlier one saw: between samples of a pack.

    Each segment then needs scores for its own keys only, not for those of the whole sequence.

    Returns:
        (first token, token after the last, first key, key after the last) of each segment; at least one key each, and all
        tokens in order.
    """
    starts, ends = intervals.T.tolist()
    found: list[tuple[int, int, int, int]] = []
    first, low, high = 0, -1, 0  # low is -1 until a token of the segment sees something
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if end <= start:
            continue
        if low >= 0 and start >= high:
            found.append((first, row, low, high))
            first, low, high = row, start, end
        else:
            low, high = (start if low < 0 else min(low, start)), max(high, end)
    found.append((first, len(starts), max(low, 0), max(high, 1)))
    return found


def _attend(
    query: Tensor, key: Tensor, value: Tensor, intervals: Tensor, scale: float | None, dropout: float
) -> Tensor:
    """Attend within one segment: query [s, n, d], key and value [k, g, d], intervals [s, 2] -> [s, n, d]."""
    empty = intervals[:, 1] <= intervals[:, 0]  # [s]
    # An empty token sees everything here and is set to zero below: a fully masked softmax would give NaN or a mean.
    mask = interval_mask(intervals, key.shape[0]) | empty[:, None]  # [s, k]
    output = scaled_dot_product_attention(
        query.transpose(0, 1)[None],  # [1, n, s, d]
        key.transpose(0, 1)[None],  # [1, g, k, d]
        value.transpose(0, 1)[None],  # [1, g, k, d]
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    output = output[0].transpose(0, 1)  # [s, n, d]
    return torch.where(empty[:, None, None], torch.zeros((), dtype=output.dtype, device=output.device), output)
