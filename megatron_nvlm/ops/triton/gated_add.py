"""residual + tanh(gate) * x as one kernel each way. Elements are computed in float32."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8


@triton.jit
def _forward_kernel(x, residual, gate, output, size, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    factor = _tanh(tl.load(gate).to(tl.float32))
    sums = tl.load(residual + places, mask=inside).to(tl.float32) + factor * tl.load(x + places, mask=inside).to(
        tl.float32
    )
    tl.store(output + places, sums.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(x, gradient, gate, x_gradient, sums, size, BLOCK: tl.constexpr):
    """Gradient of x, and this block's part of the gate's."""
    block = tl.program_id(0)
    places = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    factor = _tanh(tl.load(gate).to(tl.float32))
    above = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_gradient + places, (factor * above).to(x_gradient.dtype.element_ty), mask=inside)
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + block, (1.0 - factor * factor) * tl.sum(above * values, axis=0))


@triton.jit
def _tanh(x):
    """By exponentials, as Triton has no tanh of its own; exact at 0."""
    power = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - power) / (1.0 + power)
    return tl.where(x < 0, -magnitude, magnitude)


class GatedAdd(torch.autograd.Function):
    """(x, residual, gate [1]) -> residual + tanh(gate) * x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
        """One read of x and residual, one write."""
        x, residual = x.contiguous(), residual.contiguous()
        output = torch.empty_like(x)
        size = x.numel()
        if size:
            _forward_kernel[(triton.cdiv(size, BLOCK),)](x, residual, gate, output, size, BLOCK=BLOCK, num_warps=WARPS)
        ctx.save_for_backward(x, gate)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The gate's gradient is the sum of one part a block, in order."""
        x, gate = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        x_gradient = torch.empty_like(x)
        blocks = triton.cdiv(x.numel(), BLOCK)
        sums = torch.zeros(max(blocks, 1), dtype=torch.float32, device=x.device)
        if blocks:
            arguments = (x, gradient, gate, x_gradient, sums, x.numel())
            _backward_kernel[(blocks,)](*arguments, BLOCK=BLOCK, num_warps=WARPS)
        return x_gradient, gradient, sums.sum().to(gate.dtype).view_as(gate)
