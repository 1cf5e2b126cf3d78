"""Which form of an operation runs: the Triton kernel on CUDA, the plain PyTorch form elsewhere."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

SWITCH = "NVLM_KERNELS"
"""Environment variable; `plain` takes the plain forms on CUDA too."""
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_kernel(*tensors: Tensor) -> bool:
    """Whether a Triton kernel computes on these tensors: on CUDA, not in float64, and not switched off."""
    return (
        all(tensor.is_cuda and tensor.dtype in _KERNEL_DTYPES for tensor in tensors)
        and find_triton()
        and os.environ.get(SWITCH) != "plain"
    )


@cache
def find_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None
