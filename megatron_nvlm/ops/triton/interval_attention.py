"""Interval attention as Triton kernels: online softmax forward, and two backward kernels without atomic additions.

A program of the forward pass takes a block of query tokens of one head and reads only the keys between the first and the
last that the block sees. Keys that every token of the block sees need no mask. The backward pass has one kernel over query
blocks (dQ) and one over key blocks (dK, dV), which loops over the query heads of its group; each sum has one order, so two
runs give equal bits. Tokens with an empty range give 0 and get gradient 0.
Shapes: s query tokens, k keys, n query heads, g groups, d head size.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_nvlm.ops.interval_attention import KEY_BLOCK

LOG2_E = 1.4426950408889634
UPCAST = tl.constexpr("upcast")
"""How products of 16-bit numbers are made in Triton's interpreter."""


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel's blocks."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Of the three kernels."""

    forward: Tile
    query: Tile
    key: Tile


# Head size rounded up to a power of two -> blocks, for 16-bit inputs; none spills (tools/gpu_check.py).
_HOPPER = {
    32: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)),
    64: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
}
_AMPERE = {
    32: _HOPPER[32],
    64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
}
TILES = {80: _AMPERE, 90: _HOPPER, 100: _HOPPER}
"""By the first compute capability that takes them."""
WIDE_TILES = Tiles(Tile(32, 64, 4, 1), Tile(32, 64, 4, 1), Tile(32, 64, 4, 1))
"""For float32, whose products are computed in float32: no tensor cores, and twice the shared memory."""


_ENOUGH_PROGRAMS = 1024
"""Some for each of a Hopper GPU's 132 multiprocessors, since their work differs."""


@cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tiles_for(head_size: int, dtype: torch.dtype, capability: int) -> Tiles:
    """Blocks for a head size of at most 256."""
    if dtype == torch.float32:
        return WIDE_TILES
    known = max((least for least in TILES if least <= capability), default=min(TILES))
    return TILES[known][padded_head(head_size)]


def padded_head(head_size: int) -> int:
    """A power of two, at least 32, that holds the head."""
    return max(32, triton.next_power_of_2(head_size))


@triton.jit
def _load(base, rows, columns, row_stride, column_stride, num_rows, HEAD: tl.constexpr, GUARD_ROWS: tl.constexpr):
    """[rows, columns] of a matrix; zeros after its last row and column."""
    pointers = base + rows[:, None] * row_stride + columns[None, :] * column_stride
    if GUARD_ROWS:
        return tl.load(pointers, mask=(rows[:, None] < num_rows) & (columns[None, :] < HEAD), other=0.0)
    return tl.load(pointers, mask=columns[None, :] < HEAD, other=0.0)


@triton.jit
def _dot(left, right, acc, PRECISION: tl.constexpr):
    """acc + left @ right, added up in float32."""
    if PRECISION == UPCAST:  # Triton's interpreter reads bfloat16 as integers
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def _store(base, values, rows, columns, row_stride, column_stride, num_rows, HEAD: tl.constexpr):
    pointers = base + rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(pointers, values.to(base.dtype.element_ty), mask=(rows[:, None] < num_rows) & (columns[None, :] < HEAD))


@triton.jit
def _key_bounds(start, end, num_keys, KEYS: tl.constexpr):
    """Keys [first, last) that a block of tokens sees, and [inner, outer) of them that need no mask."""
    seen = end > start
    first = tl.min(tl.where(seen, start, num_keys), axis=0)
    last = tl.max(tl.where(seen, end, 0), axis=0)
    latest_start = tl.max(tl.where(seen, start, 0), axis=0)
    earliest_end = tl.minimum(tl.min(tl.where(seen, end, num_keys), axis=0), last)
    inner = tl.minimum(first + tl.cdiv(tl.maximum(latest_start - first, 0), KEYS) * KEYS, last)
    outer = inner + tl.maximum(earliest_end - inner, 0) // KEYS * KEYS
    return first, last, inner, outer


@triton.jit
def _forward_step(
    acc,
    total,
    largest,
    query,
    key_base,
    value_base,
    key_strides,
    value_strides,
    columns,
    start,
    end,
    scale,
    block,
    num_keys,
    HEAD: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys of the online softmax; scores are in units of log 2."""
    keys = block + tl.arange(0, KEYS)
    key = _load(key_base, keys, columns, key_strides[0], key_strides[1], num_keys, HEAD, MASKED)
    scores = _dot(query, tl.trans(key), None, PRECISION) * scale
    if MASKED:
        scores = tl.where((keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None]), scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, axis=1))
    finite = tl.where(now == float("-inf"), 0.0, now)  # nothing seen yet
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(largest - finite)
    value = _load(value_base, keys, columns, value_strides[0], value_strides[1], num_keys, HEAD, MASKED)
    acc = _dot(weights.to(value.dtype), value, acc * shrink[:, None], PRECISION)
    return acc, total * shrink + tl.sum(weights, axis=1), now


@triton.jit
def _forward_kernel(
    query_base,
    key_base,
    value_base,
    intervals,
    output_base,
    lse,
    query_row,
    query_head,
    query_column,
    key_row,
    key_head,
    key_column,
    value_row,
    value_head,
    value_column,
    output_row,
    output_head,
    output_column,
    num_rows,
    num_keys,
    heads_per_group,
    scale,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of query tokens of one head -> output and log-sum-exp (base 2)."""
    head = tl.program_id(0)
    group = head // heads_per_group
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    start = tl.load(intervals + 2 * rows, mask=rows < num_rows, other=0)
    end = tl.load(intervals + 2 * rows + 1, mask=rows < num_rows, other=0)
    first, last, inner, outer = _key_bounds(start, end, num_keys, KEYS)
    query = _load(query_base + head * query_head, rows, columns, query_row, query_column, num_rows, HEAD, True)
    key_base += group * key_head
    value_base += group * value_head
    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    largest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    key_strides = (key_row, key_column)
    value_strides = (value_row, value_column)
    for block in range(first, inner, KEYS):
        acc, total, largest = _forward_step(
            acc,
            total,
            largest,
            query,
            key_base,
            value_base,
            key_strides,
            value_strides,
            columns,
            start,
            end,
            scale,
            block,
            num_keys,
            HEAD,
            KEYS,
            True,
            PRECISION,
        )
    for block in range(inner, outer, KEYS):
        acc, total, largest = _forward_step(
            acc,
            total,
            largest,
            query,
            key_base,
            value_base,
            key_strides,
            value_strides,
            columns,
            start,
            end,
            scale,
            block,
            num_keys,
            HEAD,
            KEYS,
            False,
            PRECISION,
        )
    for block in range(outer, last, KEYS):
        acc, total, largest = _forward_step(
            acc,
            total,
            largest,
            query,
            key_base,
            value_base,
            key_strides,
            value_strides,
            columns,
            start,
            end,
            scale,
            block,
            num_keys,
            HEAD,
            KEYS,
            True,
            PRECISION,
        )
    seen = end > start
    output = tl.where(seen[:, None], acc / tl.where(total == 0.0, 1.0, total)[:, None], 0.0)
    _store(output_base + head * output_head, output, rows, columns, output_row, output_column, num_rows, HEAD)
    # Infinity makes every weight of an empty row 0 in the backward pass.
    sums = tl.where(seen, largest + tl.log2(tl.where(total == 0.0, 1.0, total)), float("inf"))
    tl.store(lse + head * num_rows + rows, sums, mask=rows < num_rows)


@triton.jit
def _delta_kernel(
    output_base,
    gradient_base,
    delta,
    output_row,
    output_head,
    output_column,
    gradient_row,
    gradient_head,
    gradient_column,
    num_rows,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum over the head of output * gradient: [n, s]."""
    head = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    output = _load(output_base + head * output_head, rows, columns, output_row, output_column, num_rows, HEAD, True)
    gradient = _load(
        gradient_base + head * gradient_head, rows, columns, gradient_row, gradient_column, num_rows, HEAD, True
    )
    sums = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), axis=1)
    tl.store(delta + head * num_rows + rows, sums, mask=rows < num_rows)


@triton.jit
def _query_step(
    acc,
    query,
    gradient,
    key_base,
    value_base,
    key_strides,
    value_strides,
    columns,
    start,
    end,
    lse,
    delta,
    scale,
    block,
    num_keys,
    HEAD: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    keys = block + tl.arange(0, KEYS)
    key = _load(key_base, keys, columns, key_strides[0], key_strides[1], num_keys, HEAD, MASKED)
    value = _load(value_base, keys, columns, value_strides[0], value_strides[1], num_keys, HEAD, MASKED)
    weights = tl.exp2(_dot(query, tl.trans(key), None, PRECISION) * scale - lse[:, None])
    if MASKED:
        weights = tl.where((keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None]), weights, 0.0)
    products = _dot(gradient, tl.trans(value), None, PRECISION)
    return _dot((weights * (products - delta[:, None])).to(key.dtype), key, acc, PRECISION)


@triton.jit
def _query_kernel(
    query_base,
    key_base,
    value_base,
    gradient_base,
    intervals,
    lse,
    delta,
    query_gradient,
    query_row,
    query_head,
    query_column,
    key_row,
    key_head,
    key_column,
    value_row,
    value_head,
    value_column,
    gradient_row,
    gradient_head,
    gradient_column,
    num_rows,
    num_keys,
    heads,
    heads_per_group,
    scale,
    score_scale,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of one block of query tokens of one head."""
    head = tl.program_id(0)
    group = head // heads_per_group
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    start = tl.load(intervals + 2 * rows, mask=rows < num_rows, other=0)
    end = tl.load(intervals + 2 * rows + 1, mask=rows < num_rows, other=0)
    first, last, inner, outer = _key_bounds(start, end, num_keys, KEYS)
    query = _load(query_base + head * query_head, rows, columns, query_row, query_column, num_rows, HEAD, True)
    gradient = _load(
        gradient_base + head * gradient_head, rows, columns, gradient_row, gradient_column, num_rows, HEAD, True
    )
    row_lse = tl.load(lse + head * num_rows + rows, mask=rows < num_rows, other=float("inf"))
    row_delta = tl.load(delta + head * num_rows + rows, mask=rows < num_rows, other=0.0)
    key_base += group * key_head
    value_base += group * value_head
    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    key_strides = (key_row, key_column)
    value_strides = (value_row, value_column)
    for block in range(first, inner, KEYS):
        acc = _query_step(
            acc,
            query,
            gradient,
            key_base,
            value_base,
            key_strides,
            value_strides,
            columns,
            start,
            end,
            row_lse,
            row_delta,
            scale,
            block,
            num_keys,
            HEAD,
            KEYS,
            True,
            PRECISION,
        )
    for block in range(inner, outer, KEYS):
        acc = _query_step(
            acc,
            query,
            gradient,
            key_base,
            value_base,
            key_strides,
            value_strides,
            columns,
            start,
            end,
            row_lse,
            row_delta,
            scale,
            block,
            num_keys,
            HEAD,
            KEYS,
            False,
            PRECISION,
        )
    for block in range(outer, last, KEYS):
        acc = _query_step(
            acc,
            query,
            gradient,
            key_base,
            value_base,
            key_strides,
            value_strides,
            columns,
            start,
            end,
            row_lse,
            row_delta,
            scale,
            block,
            num_keys,
            HEAD,
            KEYS,
            True,
            PRECISION,
        )
    _store(query_gradient + head * HEAD, acc * score_scale, rows, columns, heads * HEAD, 1, num_rows, HEAD)


@triton.jit
def _key_kernel(
    query_base,
    key_base,
    value_base,
    gradient_base,
    intervals,
    block_rows,
    lse,
    delta,
    key_gradient,
    value_gradient,
    query_row,
    query_head,
    query_column,
    key_row,
    key_head,
    key_column,
    value_row,
    value_head,
    value_column,
    gradient_row,
    gradient_head,
    gradient_column,
    num_rows,
    num_keys,
    num_blocks,
    parts,
    parts_per_group,
    heads_per_part,
    scale,
    score_scale,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ENTRY: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of one block of keys, summed in order over a part of its group's query heads."""
    part = tl.program_id(0)
    group = part // parts_per_group
    block = tl.program_id(1)
    keys = block * KEYS + tl.arange(0, KEYS)
    columns = tl.arange(0, WIDTH)
    entries = block * (KEYS // ENTRY) + tl.arange(0, ENTRIES)
    known = (entries < num_blocks) & (entries < (block + 1) * (KEYS // ENTRY))
    entry_first = tl.load(block_rows + 2 * entries, mask=known, other=0)
    entry_last = tl.load(block_rows + 2 * entries + 1, mask=known, other=0)
    used = entry_last > entry_first
    first = tl.min(tl.where(used, entry_first, num_rows), axis=0)
    last = tl.max(tl.where(used, entry_last, 0), axis=0)
    key = _load(key_base + group * key_head, keys, columns, key_row, key_column, num_keys, HEAD, True)
    value = _load(value_base + group * value_head, keys, columns, value_row, value_column, num_keys, HEAD, True)
    key_sum = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    value_sum = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    for index in range(heads_per_part):
        head = part * heads_per_part + index
        for row in range(first, last, ROWS):
            rows = row + tl.arange(0, ROWS)
            start = tl.load(intervals + 2 * rows, mask=rows < num_rows, other=0)
            end = tl.load(intervals + 2 * rows + 1, mask=rows < num_rows, other=0)
            row_lse = tl.load(lse + head * num_rows + rows, mask=rows < num_rows, other=float("inf"))
            row_delta = tl.load(delta + head * num_rows + rows, mask=rows < num_rows, other=0.0)
            query = _load(query_base + head * query_head, rows, columns, query_row, query_column, num_rows, HEAD, True)
            gradient = _load(
                gradient_base + head * gradient_head, rows, columns, gradient_row, gradient_column, num_rows, HEAD, True
            )
            weights = tl.exp2(_dot(key, tl.trans(query), None, PRECISION) * scale - row_lse[None, :])
            weights = tl.where((keys[:, None] >= start[None, :]) & (keys[:, None] < end[None, :]), weights, 0.0)
            value_sum = _dot(weights.to(gradient.dtype), gradient, value_sum, PRECISION)
            products = _dot(value, tl.trans(gradient), None, PRECISION)
            scores = (weights * (products - row_delta[None, :])).to(query.dtype)
            key_sum = _dot(scores, query, key_sum, PRECISION)
    _store(key_gradient + part * HEAD, key_sum * score_scale, keys, columns, parts * HEAD, 1, num_keys, HEAD)
    _store(value_gradient + part * HEAD, value_sum, keys, columns, parts * HEAD, 1, num_keys, HEAD)


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
        tile = tiles_for(head_size, query.dtype, _capability(query.device)).forward
        _forward_kernel[(heads, triton.cdiv(rows, tile.rows))](
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
        tiles = tiles_for(head_size, query.dtype, _capability(query.device))
        strides = (*query.stride(), *key.stride(), *value.stride(), *gradient.stride())
        scales = (ctx.scale * LOG2_E, ctx.scale)
        delta = torch.empty_like(lse)
        _delta_kernel[(heads, triton.cdiv(rows, 64))](
            *(output, gradient, delta, *output.stride(), *gradient.stride(), rows),
            **{"HEAD": head_size, "WIDTH": padded_head(head_size), "ROWS": 64},
        )
        query_gradient = query.new_empty(query.shape)
        _query_kernel[(heads, triton.cdiv(rows, tiles.query.rows))](
            *(query, key, value, gradient, intervals, lse, delta, query_gradient, *strides),
            *(rows, keys, heads, heads // groups, *scales),
            **_constants(head_size, query.dtype, tiles.query),
        )
        blocks = triton.cdiv(keys, tiles.key.keys)
        per_group = parts_of_group(heads // groups, blocks * groups)
        parts = groups * per_group
        both = key.new_empty(2, keys, parts, head_size, dtype=key.dtype if per_group == 1 else torch.float32)
        _key_kernel[(parts, blocks)](
            *(query, key, value, gradient, intervals, block_rows, lse, delta, both[0], both[1], *strides),
            *(rows, keys, len(block_rows), parts, per_group, heads // parts, *scales),
            **_constants(head_size, query.dtype, tiles.key),
            ENTRY=KEY_BLOCK,
            ENTRIES=triton.next_power_of_2(tiles.key.keys // KEY_BLOCK),
        )
        if per_group > 1:
            both = both.unflatten(2, (groups, per_group)).sum(3).to(key.dtype)  # [2, k, g, d]
        return query_gradient, both[0], both[1], None, None, None


def parts_of_group(heads: int, programs: int) -> int:
    """In how many parts a group's query heads are summed side by side, so that the GPU has enough to do.

    Args:
        programs: those of the kernel with one part.
    """
    divisors = [parts for parts in range(1, heads + 1) if heads % parts == 0]
    return next((parts for parts in divisors if parts * programs >= _ENOUGH_PROGRAMS), heads)


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
