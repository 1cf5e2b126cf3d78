"""Device code of interval attention (interval_attention.py says what it computes).

Shapes: s query tokens, k keys, n query heads, g groups, d head size. Scores are in units of log 2.
"""

import triton
import triton.language as tl

UPCAST = tl.constexpr("upcast")
"""How products of 16-bit numbers are made in Triton's interpreter."""


@triton.jit
def _load(base, rows, columns, strides, num_rows, HEAD: tl.constexpr, GUARD_ROWS: tl.constexpr):
    """[rows, columns] of a matrix; zeros after its last row and column. `strides` are those of row and column."""
    pointers = base + rows[:, None] * strides[0] + columns[None, :] * strides[1]
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
def _store(base, values, rows, columns, strides, num_rows, HEAD: tl.constexpr):
    pointers = base + rows[:, None] * strides[0] + columns[None, :] * strides[1]
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
    key = _load(key_base, keys, columns, key_strides, num_keys, HEAD, MASKED)
    scores = _dot(query, tl.trans(key), None, PRECISION) * scale
    if MASKED:
        scores = tl.where((keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None]), scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, axis=1))
    finite = tl.where(now == float("-inf"), 0.0, now)  # nothing seen yet
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(largest - finite)
    value = _load(value_base, keys, columns, value_strides, num_keys, HEAD, MASKED)
    acc = _dot(weights.to(value.dtype), value, acc * shrink[:, None], PRECISION)
    return acc, total * shrink + tl.sum(weights, axis=1), now


@triton.jit
def forward_kernel(
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
    query = _load(query_base + head * query_head, rows, columns, (query_row, query_column), num_rows, HEAD, True)
    key_base += group * key_head
    value_base += group * value_head
    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    largest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    key_strides = (key_row, key_column)
    value_strides = (value_row, value_column)
    bounds = (first, inner, outer, last)
    for phase in tl.static_range(3):  # only the keys between need no mask
        for block in range(bounds[phase], bounds[phase + 1], KEYS):
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
                phase != 1,
                PRECISION,
            )
    seen = end > start
    output = tl.where(seen[:, None], acc / tl.where(total == 0.0, 1.0, total)[:, None], 0.0)
    _store(output_base + head * output_head, output, rows, columns, (output_row, output_column), num_rows, HEAD)
    # Infinity makes every weight of an empty row 0 in the backward pass.
    sums = tl.where(seen, largest + tl.log2(tl.where(total == 0.0, 1.0, total)), float("inf"))
    tl.store(lse + head * num_rows + rows, sums, mask=rows < num_rows)


@triton.jit
def delta_kernel(
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
    output = _load(output_base + head * output_head, rows, columns, (output_row, output_column), num_rows, HEAD, True)
    gradient = _load(
        gradient_base + head * gradient_head, rows, columns, (gradient_row, gradient_column), num_rows, HEAD, True
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
    key = _load(key_base, keys, columns, key_strides, num_keys, HEAD, MASKED)
    value = _load(value_base, keys, columns, value_strides, num_keys, HEAD, MASKED)
    weights = tl.exp2(_dot(query, tl.trans(key), None, PRECISION) * scale - lse[:, None])
    if MASKED:
        weights = tl.where((keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None]), weights, 0.0)
    products = _dot(gradient, tl.trans(value), None, PRECISION)
    return _dot((weights * (products - delta[:, None])).to(key.dtype), key, acc, PRECISION)


@triton.jit
def query_kernel(
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
    query = _load(query_base + head * query_head, rows, columns, (query_row, query_column), num_rows, HEAD, True)
    gradient = _load(
        gradient_base + head * gradient_head, rows, columns, (gradient_row, gradient_column), num_rows, HEAD, True
    )
    row_lse = tl.load(lse + head * num_rows + rows, mask=rows < num_rows, other=float("inf"))
    row_delta = tl.load(delta + head * num_rows + rows, mask=rows < num_rows, other=0.0)
    key_base += group * key_head
    value_base += group * value_head
    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    key_strides = (key_row, key_column)
    value_strides = (value_row, value_column)
    bounds = (first, inner, outer, last)
    for phase in tl.static_range(3):  # only the keys between need no mask
        for block in range(bounds[phase], bounds[phase + 1], KEYS):
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
                phase != 1,
                PRECISION,
            )
    _store(query_gradient + head * HEAD, acc * score_scale, rows, columns, (heads * HEAD, 1), num_rows, HEAD)


@triton.jit
def key_kernel(
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
    key = _load(key_base + group * key_head, keys, columns, (key_row, key_column), num_keys, HEAD, True)
    value = _load(value_base + group * value_head, keys, columns, (value_row, value_column), num_keys, HEAD, True)
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
            query = _load(
                query_base + head * query_head, rows, columns, (query_row, query_column), num_rows, HEAD, True
            )
            gradient = _load(
                gradient_base + head * gradient_head,
                rows,
                columns,
                (gradient_row, gradient_column),
                num_rows,
                HEAD,
                True,
            )
            weights = tl.exp2(_dot(key, tl.trans(query), None, PRECISION) * scale - row_lse[None, :])
            weights = tl.where((keys[:, None] >= start[None, :]) & (keys[:, None] < end[None, :]), weights, 0.0)
            value_sum = _dot(weights.to(gradient.dtype), gradient, value_sum, PRECISION)
            products = _dot(value, tl.trans(gradient), None, PRECISION)
            scores = (weights * (products - row_delta[None, :])).to(query.dtype)
            key_sum = _dot(scores, query, key_sum, PRECISION)
    _store(key_gradient + part * HEAD, key_sum * score_scale, keys, columns, (parts * HEAD, 1), num_keys, HEAD)
    _store(value_gradient + part * HEAD, value_sum, keys, columns, (parts * HEAD, 1), num_keys, HEAD)
