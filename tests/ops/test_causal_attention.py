"""Causal attention over ragged rows against brute force, in both of its ways (padded batch and loop)."""

import math

import pytest
import torch
from torch import Tensor

from megatron_nvlm.ops.causal_attention import causal_attention


def brute_force(query: Tensor, key: Tensor, value: Tensor, boundaries: list[int]) -> Tensor:
    output = torch.zeros_like(query)
    share = query.shape[1] // key.shape[1]
    for start, end in zip(boundaries, boundaries[1:], strict=False):
        for row in range(start, end):
            for head in range(query.shape[1]):
                scores = key[start : row + 1, head // share] @ query[row, head] / math.sqrt(query.shape[-1])
                output[row, head] = scores.softmax(0) @ value[start : row + 1, head // share]
    return output


@pytest.mark.parametrize("lengths", [[5], [4, 5, 3], [20, 1, 1, 2], [1, 1], [7, 0, 3]])
def test_equals_brute_force(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = sum(lengths)
    query = torch.randn(rows, 4, 6, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, rows, 2, 6, generator=generator, dtype=torch.float64)
    boundaries = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    output = causal_attention(query, key, value, boundaries)
    torch.testing.assert_close(output, brute_force(query, key, value, boundaries), rtol=1e-12, atol=1e-12)
