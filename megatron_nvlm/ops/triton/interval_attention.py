"""Interval attention as Triton kernels: online softmax forward, and two backward kernels without atomic additions.

A program of the forward pass takes a block of query tokens of one head and reads only the keys between the first and the
last that the block sees. Keys that every token of the block sees need no mask. The backward pass has one kernel over query
blocks (dQ) and one over key blocks (dK, dV), which loops over the query heads of its group; each sum has one order, so two
runs give equal bits. Tokens with an empty range give 0 and get gradient 0.
Shapes: s query tokens, k keys, n query heads, g groups, d head size.
"""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_nvlm.ops.interval_attention import KEY_BLOCK
from megatron_nvlm.ops.triton.interval_kernels import delta_kernel, forward_kernel, key_kernel, query_kernel
from megatron_nvlm.ops.triton.interval_tiles import (
    DELTA_ROWS,
    Tile,
    capability_of,
    padded_head,
    parts_of_group,
    tiles_for,
)

LOG2_E = 1.4426950408889634


class IntervalAttention(torch.autograd.Function):
    """(query [s, n, d], key and value [k, g, d], intervals [s, 2], block rows, scale) -> [s, n, d]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, intervals: Tensor, block_rows: Tensor, scale: float
    ) -> Tensor:
        """Online softmax over the keys that each block of tokens sees."""
        rows, heads, head_size = query.shape
        keys, groups, _ = key.shape
        intervals, block_rows = intervals.contiguous(), block_rows.contiguous()
        output = query.new_empty(query.shape)
        lse = torch.empty(heads, rows, dtype=torch.float32, device=query.device)
        tile = tiles_for(head_size, query.dtype, capability_of(query.device)).forward
        forward_kernel[(heads, triton.cdiv(rows, tile.rows))](
            *(query, key, value, intervals, output, lse),
            *(*query.stride(), *key.stride(), *value.stride(), *output.stride()),
            *(rows, keys, heads // groups, scale * LOG2_E),
            **_constants(head_size, query.dtype, tile),
        )
        ctx.save_for_backward(query, key, value, intervals, block_rows, output, lse)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        """dQ by query blocks; dK and dV by key blocks."""
        query, key, value, intervals, block_rows, output, lse = ctx.saved_tensors
        gradient = gradients[0]
        rows, heads, head_size = query.shape
        keys, groups, _ = key.shape
        tiles = tiles_for(head_size, query.dtype, capability_of(query.device))
        strides = (*query.stride(), *key.stride(), *value.stride(), *gradient.stride())
        scales = (ctx.scale * LOG2_E, ctx.scale)
        delta = torch.empty_like(lse)
        delta_kernel[(heads, triton.cdiv(rows, DELTA_ROWS))](
            *(output, gradient, delta, *output.stride(), *gradient.stride(), rows),
            **{"HEAD": head_size, "WIDTH": padded_head(head_size), "ROWS": DELTA_ROWS},
        )
        query_gradient = query.new_empty(query.shape)
        query_kernel[(heads, triton.cdiv(rows, tiles.query.rows))](
            *(query, key, value, gradient, intervals, lse, delta, query_gradient, *strides),
            *(rows, keys, heads, heads // groups, *scales),
            **_constants(head_size, query.dtype, tiles.query),
        )
        blocks = triton.cdiv(keys, tiles.key.keys)
        per_group = parts_of_group(heads // groups, blocks * groups)
        parts = groups * per_group
        both = key.new_empty(2, keys, parts, head_size, dtype=key.dtype if per_group == 1 else torch.float32)
        key_kernel[(parts, blocks)](
            *(query, key, value, gradient, intervals, block_rows, lse, delta, both[0], both[1], *strides),
            *(rows, keys, len(block_rows), parts, per_group, heads // parts, *scales),
            **_constants(head_size, query.dtype, tiles.key),
            ENTRY=KEY_BLOCK,
            ENTRIES=triton.next_power_of_2(tiles.key.keys // KEY_BLOCK),
        )
        if per_group > 1:
            both = both.unflatten(2, (groups, per_group)).sum(3).to(key.dtype)  # [2, k, g, d]
        return query_gradient, both[0], both[1], None, None, None


@cache
def _constants(head_size: int, dtype: torch.dtype, tile: Tile) -> dict[str, Any]:
    return {
        "HEAD": head_size,
        "WIDTH": padded_head(head_size),
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "PRECISION": _precision(dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _precision(dtype: torch.dtype) -> str:
    """How products are made; `tf32` says nothing of 16-bit numbers, whose products are exact."""
    if dtype == torch.float32:
        return "ieee"
    return "upcast" if triton.knobs.runtime.interpret else "tf32"
