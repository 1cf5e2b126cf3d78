"""Triton kernels against float64, in Triton's interpreter: shapes that break kernels, and equal bits in two runs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_nvlm.ops import interval_attention as plain
from megatron_nvlm.ops import linear_cross_entropy as loss_module
from megatron_nvlm.ops.linear_cross_entropy import VocabularyPart, linear_cross_entropy, score_rows

pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available():
    pytest.skip("there is a GPU: tests/gpu runs the kernels on it", allow_module_level=True)

from megatron_nvlm.ops.triton.gated_add import GatedAdd
from megatron_nvlm.ops.triton.interval_attention import IntervalAttention
from megatron_nvlm.ops.triton.interval_tiles import parts_of_group

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative L2 error."""
INTERVALS = {
    "tiles, text, nothing seen": [[0, 0]] * 10 + [[0, 70]] * 20 + [[70, 140]] * 20 + [[0, 140]] * 30 + [[5, 5]] * 3,
    "two samples": [[0, 100]] * 40 + [[100, 201]] * 57,
    "causal": [[0, row + 1] for row in range(90)] + [[90, row + 1] for row in range(90, 201)],
    "one tile, one token": [[3, 4]],
    "all empty": [[0, 0]] * 5,
}
HEADS = {"16 heads of 1": (16, 1, 64), "equal": (3, 3, 80), "2 a group": (4, 2, 96), "wide": (2, 1, 128)}


def error(found: Tensor, exact: Tensor) -> float:
    """Relative L2; absolute where nothing, or only rounding, is expected (a token with one key has no gradient)."""
    return float((found.double() - exact).norm() / (exact.norm() if exact.norm() > 1e-6 else 1))


def run(inputs: list[Tensor], intervals: Tensor, above: Tensor, exact: bool = False) -> list[Tensor]:
    """Output and gradients."""
    leaves = [one.detach().requires_grad_() for one in inputs]
    if exact:
        output = plain.interval_attention(*leaves, intervals)
    else:
        blocks = torch.from_numpy(plain.block_rows(intervals.numpy(), len(inputs[1])))
        output = IntervalAttention.apply(*leaves, intervals, blocks, inputs[0].shape[-1] ** -0.5)
    return [output, *torch.autograd.grad(output, leaves, above)]


def made_inputs(tokens: int, heads: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value; not contiguous."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(tokens, heads[0]), (201, heads[1]), (201, heads[1])]
    return [torch.randn(count, 2 * n, heads[2], generator=generator).to(dtype)[:, ::2] for count, n in shapes]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", INTERVALS)
def test_interval_attention(name: str, heads: str, dtype: torch.dtype) -> None:
    intervals = torch.tensor(INTERVALS[name], dtype=torch.int32)
    inputs = made_inputs(len(intervals), HEADS[heads], dtype)
    above = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2))
    found = run(inputs, intervals, above.to(dtype))
    exact = run([one.double() for one in inputs], intervals, above.to(dtype).double(), exact=True)
    assert [error(*pair) <= BOUNDS[dtype] for pair in zip(found, exact, strict=True)] == [True] * 4
    empty = intervals[:, 0] >= intervals[:, 1]
    assert not found[0][empty].any() and not found[1][empty].any()
    again = run(inputs, intervals, above.to(dtype))
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


def test_heads_of_a_group_are_summed_in_parts() -> None:
    assert [parts_of_group(8, programs) for programs in (1, 200, 512, 4096)] == [8, 8, 2, 1]


@pytest.mark.parametrize("seed", range(20))
def test_block_rows_hold_every_token_that_sees_a_block(seed: int) -> None:
    random = np.random.default_rng(seed)
    keys = int(random.integers(1, 300))
    intervals = np.sort(random.integers(0, keys + 1, (int(random.integers(1, 90)), 2)), axis=1)
    for block, (first, last) in enumerate(plain.block_rows(intervals, keys)):
        start, end = block * plain.KEY_BLOCK, (block + 1) * plain.KEY_BLOCK
        sees = (intervals[:, 1] > intervals[:, 0]) & (intervals[:, 0] < end) & (intervals[:, 1] > start)
        rows = np.flatnonzero(sees)
        assert (first, last) == ((rows[0], rows[-1] + 1) if len(rows) else (0, 0))


@pytest.mark.parametrize("dtype", [torch.float64, *BOUNDS])
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_linear_cross_entropy(rows: int, kernel: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded columns, several chunks, no rows; against torch's cross entropy of whole logits."""
    if kernel and dtype == torch.float64:
        pytest.skip("the kernel computes in float32")
    monkeypatch.setattr(loss_module, "runs_kernel", lambda *tensors: kernel)
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 1)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, 32, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(5000, 32, generator=generator) * 0.2).to(dtype).requires_grad_()
    labels = torch.randint(0, 4990, (rows,), generator=generator)
    total, each = linear_cross_entropy(hidden, weight, labels, VocabularyPart(None, 4990))
    found = [total, each, *torch.autograd.grad(2 * total, (hidden, weight))]
    wide = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    exact_each = torch.nn.functional.cross_entropy((wide[0] @ wide[1].T)[:, :4990], labels, reduction="none")
    exact = [exact_each.sum(), exact_each, *torch.autograd.grad(2 * exact_each.sum(), wide)]
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert [error(*pair) <= bound for pair in zip(found, exact, strict=True)] == [True] * 4
    scored, right = score_rows(hidden, weight, labels, VocabularyPart(None, 4990))
    assert torch.equal(scored, each)
    logits = (hidden @ weight.T)[:, :4990]
    assert torch.equal(right, logits.argmax(1) == labels)
    _, of_most_likely = score_rows(hidden, weight, logits.argmax(1), VocabularyPart(None, 4990))
    assert of_most_likely.all() and len(of_most_likely) == rows


def test_of_equally_likely_ids_the_first_is_predicted() -> None:
    weight = torch.zeros(6, 3)
    weight[[2, 4, 5]] = 1.0  # the last is padding
    _, right = score_rows(torch.ones(3, 3), weight, torch.tensor([2, 4, 0]), VocabularyPart(None, 5))
    assert right.tolist() == [True, False, False]


@pytest.mark.parametrize("gate", [0.0, 0.3, -2.0])
def test_gated_add(gate: float) -> None:
    generator = torch.Generator().manual_seed(4)
    x, residual, above = (torch.randn(70, 1, 90, generator=generator) for _ in range(3))
    leaves = [x.requires_grad_(), residual.requires_grad_(), torch.tensor([gate], requires_grad=True)]
    output = GatedAdd.apply(*leaves)
    found = [output, *torch.autograd.grad(output, leaves, above)]
    wide = [one.detach().double().requires_grad_() for one in leaves]
    exact_output = wide[1] + torch.tanh(wide[2]) * wide[0]
    exact = [exact_output, *torch.autograd.grad(exact_output, wide, above.double())]
    assert max(error(*pair) for pair in zip(found, exact, strict=True)) <= 1e-5
