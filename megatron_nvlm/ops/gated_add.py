"""residual + tanh(gate) * dropout(x + bias): what gated cross-attention adds to the residual stream."""

import torch
from torch import Tensor

from megatron_nvlm.ops.dispatch import runs_kernel


def gated_add(
    x: Tensor, bias: Tensor | None, residual: Tensor, gate: Tensor, dropout: float = 0.0, training: bool = False
) -> Tensor:
    """residual + tanh(gate) * dropout(x + bias).

    On CUDA, without dropout and bias, one kernel reads and writes each element once, and the gradient of the gate is summed
    in float32 in one order.

    Args:
        x, residual: [..., h] of one dtype.
        bias: [h] or None.
        gate: [1].
        dropout: probability; of effect in training.
    """
    if bias is not None:
        x = x + bias
    dropped = training and dropout > 0
    if not dropped and x.dtype == residual.dtype and runs_kernel(x, residual):
        from megatron_nvlm.ops.triton.gated_add import GatedAdd

        fused: Tensor = GatedAdd.apply(x, residual, gate)
        return fused
    return residual + torch.tanh(gate) * torch.nn.functional.dropout(x, dropout, training)
