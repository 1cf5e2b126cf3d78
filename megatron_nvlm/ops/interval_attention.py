"""Attention in which each query token sees one contiguous range of keys.

A range per token describes every mask of NVLM-X and NVLM-H (docs/design: "one interval per token"), for ragged tiles,
several images and packed samples, without padding. The readable form is here and runs everywhere; on CUDA a kernel
(ops/triton/interval_attention.py) reads only the keys that a block of tokens sees.

Example, 5 query tokens and 6 keys (two tiles of 3 tokens)::

    intervals   row of the mask
    [0, 0)      ......        text before the image: sees nothing, output exactly 0
    [0, 3)      xxx...        the tag of tile 1
    [3, 6)      ...xxx        the tag of tile 2
    [0, 6)      xxxxxx        text after the image
    [0, 6)      xxxxxx
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_nvlm.ops.dispatch import runs_kernel

KEY_BLOCK = 64
"""Keys of an entry of `block_rows`."""
_LARGEST_HEAD = 256
_MOST_ELEMENTS = 2**31
"""Of a tensor that the kernel addresses."""


def interval_mask(intervals: Tensor, num_keys: int) -> Tensor:
    """The ranges as a dense mask: [tokens, num_keys], true where the token sees the key. `intervals` is [tokens, 2]."""
    position = torch.arange(num_keys, device=intervals.device)  # [num_keys]
    return (position >= intervals[:, :1]) & (position < intervals[:, 1:])


def runs_of_equal_range(intervals: np.ndarray) -> list[np.ndarray]:
    """Tokens of equal range, one after the other, as one array of their places: few runs, where there are many tokens.

    Tokens that see nothing are left out.
    """
    seen = np.flatnonzero(intervals[:, 1] > intervals[:, 0])
    changes = np.flatnonzero((np.diff(intervals[seen], axis=0) != 0).any(axis=1)) + 1
    return np.split(seen, changes) if len(seen) else []


def block_rows(intervals: np.ndarray, num_keys: int) -> np.ndarray:
    """For each block of KEY_BLOCK keys, the tokens from the first to the last that see a key of it.

    The loader makes it once a micro-batch; the backward kernel reads no other tokens for that block.

    Args:
        intervals: [tokens, 2].

    Returns:
        [ceil(num_keys / KEY_BLOCK), 2] int32, first token and token after the last; 0, 0 where no token sees the block.
    """
    blocks = -(-num_keys // KEY_BLOCK)
    first = np.full(blocks, len(intervals), dtype=np.int64)
    last = np.zeros(blocks, dtype=np.int64)
    for run in runs_of_equal_range(intervals):
        start, end = intervals[run[0]]
        touched = slice(start // KEY_BLOCK, -(-end // KEY_BLOCK))
        first[touched] = np.minimum(first[touched], run[0])
        last[touched] = np.maximum(last[touched], run[-1] + 1)
    return np.stack([np.where(last > 0, first, 0), last], axis=1).astype(np.int32)


def interval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: Tensor,
    scale: float | None = None,
    dropout: float = 0.0,
    rows_of_blocks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each token over its own range of keys; a token with an empty range is exactly zero.

    Args:
        query: [tokens, heads, head_dim].
        key, value: [keys, groups, head_dim]; `heads` is a multiple of `groups` (grouped-query attention).
        intervals: [tokens, 2] integers, the range [start, end) of keys that the token sees.
        scale: factor of the scores; head_dim ** -0.5 by default.
        dropout: probability with which an attention weight is dropped.
        rows_of_blocks: what `block_rows` says of the intervals; made here where it is needed and not given, which on CUDA
            waits for the device.

    Returns:
        [tokens, heads, head_dim].
    """
    if key.shape[0] == 0:
        return query * 0
    if _has_kernel(query, key, dropout) and runs_kernel(query, key, value):
        from megatron_nvlm.ops.triton.interval_attention import IntervalAttention

        if rows_of_blocks is None:
            found = block_rows(intervals.cpu().numpy(), len(key))
            rows_of_blocks = torch.from_numpy(found).to(intervals.device)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        fused: Tensor = IntervalAttention.apply(query, key, value, intervals, rows_of_blocks, scale)
        return fused
    return plain_interval_attention(query, key, value, intervals, scale, dropout)


def plain_interval_attention(
    query: Tensor, key: Tensor, value: Tensor, intervals: Tensor, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """The readable form of `interval_attention`, over at least one key."""
    outputs = [
        _attend(query[first:last], key[start:end], value[start:end], intervals[first:last] - start, scale, dropout)
        for first, last, start, end in segments(intervals)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]  # [tokens, heads, head_dim]


def _has_kernel(query: Tensor, key: Tensor, dropout: float) -> bool:
    """Whether the kernel computes this: no dropout of weights, and places that fit 32 bits."""
    return dropout == 0 and query.shape[-1] <= _LARGEST_HEAD and max(query.numel(), key.numel()) < _MOST_ELEMENTS


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
