"""Interval attention against brute force: one row, one head, one key at a time."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_nvlm.ops.interval_attention import interval_attention, segments


def brute_force(query: Tensor, key: Tensor, value: Tensor, intervals: Tensor) -> Tensor:
    output = torch.zeros_like(query)
    share = query.shape[1] // key.shape[1]
    for row, (start, end) in enumerate(intervals.tolist()):
        for head in range(query.shape[1]):
            if end > start:
                scores = key[start:end, head // share] @ query[row, head] / math.sqrt(query.shape[-1])
                output[row, head] = scores.softmax(0) @ value[start:end, head // share]
    return output


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, int, list[tuple[int, int]]]:
    keys = draw(st.integers(1, 24))
    groups = draw(st.sampled_from([1, 2]))
    share = draw(st.sampled_from([1, 3]))
    ends = st.tuples(st.integers(0, keys), st.integers(0, keys)).map(sorted).map(tuple)
    intervals = draw(st.lists(ends, min_size=1, max_size=20))
    if draw(st.booleans()):
        intervals.sort()  # as packed samples are
    return draw(st.integers(0, 10_000)), keys, groups, share, intervals  # type: ignore[return-value]


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_brute_force(case: tuple[int, int, int, int, list[tuple[int, int]]]) -> None:
    seed, keys, groups, share, ranges = case
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    query, key, value = draw(len(ranges), groups * share, 4), draw(keys, groups, 4), draw(keys, groups, 4)
    intervals = torch.tensor(ranges, dtype=torch.int32)
    output = interval_attention(query, key, value, intervals)
    expected = brute_force(query, key, value, intervals)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    empty = intervals[:, 0] >= intervals[:, 1]
    assert bool((output[empty] == 0).all())
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((output * weights).sum(), (query, key, value))
    if bool(empty.all()):
        assert all(bool((gradient == 0).all()) for gradient in ours)
        return
    theirs = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_segments_cover_rows_and_keys(ranges: list[tuple[int, int]]) -> None:
    found = segments(torch.tensor(ranges, dtype=torch.int32))
    assert found[0][0] == 0 and found[-1][1] == len(ranges)
    assert all(before[1] == after[0] for before, after in zip(found, found[1:], strict=False))
    for first, last, low, high in found:
        assert high > low
        for start, end in ranges[first:last]:
            assert end <= start or (low <= start and end <= high)


def test_packed_samples_are_cut_apart() -> None:
    # Two samples whose keys do not meet: each is scored against its own keys alone.
    intervals = torch.tensor([[0, 0], [0, 3], [0, 6], [0, 0], [6, 8], [6, 9]])
    assert segments(intervals) == [(0, 4, 0, 6), (4, 6, 6, 9)]


def test_no_keys_at_all_is_zero() -> None:
    query = torch.randn(3, 2, 4, requires_grad=True)
    output = interval_attention(query, torch.zeros(0, 2, 4), torch.zeros(0, 2, 4), torch.zeros(3, 2, dtype=torch.int32))
    assert torch.equal(output, torch.zeros(3, 2, 4))
