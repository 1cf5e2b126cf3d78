"""Softmax over the columns of a wide matrix: one read for its statistics, one read and write for the gradient.

Used by ops/linear_cross_entropy.py, whose columns are a rank's part of the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
WARPS = 8


@triton.jit
def _statistics_kernel(
    logits, labels, largest, total, target, logits_row, first_column, real_columns, COLUMNS: tl.constexpr
):
    """Of one row: its largest logit, the sum of exp(logit - largest), and the logit of its label (0 elsewhere)."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * logits_row
    most = tl.full([COLUMNS], float("-inf"), dtype=tl.float32)
    sums = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(0, real_columns, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        values = tl.load(base + columns, mask=columns < real_columns, other=float("-inf")).to(tl.float32)
        now = tl.maximum(most, values)
        finite = tl.where(now == float("-inf"), 0.0, now)
        sums = sums * tl.exp(most - finite) + tl.exp(values - finite)
        most = now
    row_most = tl.max(most, axis=0)
    finite = tl.where(row_most == float("-inf"), 0.0, row_most)
    label = tl.load(labels + row) - first_column
    here = (label >= 0) & (label < real_columns)
    tl.store(largest + row, row_most)
    tl.store(total + row, tl.sum(sums * tl.exp(most - finite), axis=0))
    tl.store(target + row, tl.load(base + label, mask=here, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(
    logits, labels, largest, total, logits_row, first_column, real_columns, num_columns, COLUMNS: tl.constexpr
):
    """Softmax minus one at the label, in place of the logits; 0 in columns that stand for no id."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * logits_row
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(base + columns, mask=columns < real_columns, other=float("-inf")).to(tl.float32)
    label = tl.load(labels + row) - first_column
    shares = tl.exp(values - tl.load(largest + row)) / tl.load(total + row)
    gradient = tl.where(columns == label, shares - 1.0, shares)
    tl.store(base + columns, gradient.to(logits.dtype.element_ty), mask=columns < num_columns)


def row_statistics(
    logits: Tensor, labels: Tensor, first_column: int, real_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of exp(logit - largest) and logit of the label, each [rows] in float32.

    Args:
        logits: [rows, columns], columns side by side in memory.
        labels: [rows] ids in the whole vocabulary.
        first_column: id of column 0.
        real_columns: columns before the padding of the vocabulary.
    """
    rows = len(logits)
    largest, total, target = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    if rows:
        arguments = (logits, labels, largest, total, target, logits.stride(0), first_column, real_columns)
        _statistics_kernel[(rows,)](*arguments, COLUMNS=COLUMNS, num_warps=WARPS)
    return largest, total, target


def gradient_in_place(
    logits: Tensor, labels: Tensor, largest: Tensor, total: Tensor, first_column: int, real_columns: int
) -> Tensor:
    """The logits' memory with the gradient of the cross entropy; `largest` and `total` are over all ranks."""
    rows, columns = logits.shape
    if rows:
        arguments = (logits, labels, largest, total, logits.stride(0), first_column, real_columns, columns)
        _gradient_kernel[(rows, triton.cdiv(columns, COLUMNS))](*arguments, COLUMNS=COLUMNS, num_warps=WARPS)
    return logits
