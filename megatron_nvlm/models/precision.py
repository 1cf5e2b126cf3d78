"""Precisions of a run: one record each. A new precision is one line of the table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_nvlm.errors import UserError


@dataclass(frozen=True)
class Precision:
    """What a precision means for weights, gradients and the optimizer."""

    name: str
    parameter_dtype: torch.dtype
    gradient_dtype: torch.dtype
    """Of the buffers in which gradients are added up and reduced over ranks."""
    optimizer_bytes: int
    """Bytes of optimizer state a parameter: two moments, and a float32 copy where weights are narrower."""
    core: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of Megatron-core's TransformerConfig and OptimizerConfig."""
    token_multiple: int = 1
    """Tokens of a micro-batch are padded to a multiple of this (8-bit matrix products ask for it)."""


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("bf16", torch.bfloat16, torch.float32, optimizer_bytes=12, core={"bf16": True}),
        Precision("fp32", torch.float32, torch.float32, optimizer_bytes=8),
        Precision("fp64", torch.float64, torch.float64, optimizer_bytes=16),  # for tests that compare layouts
    )
}


def find_precision(name: str) -> Precision:
    """The precision of that name.

    Raises:
        UserError: there is none.
    """
    if name not in PRECISIONS:
        raise UserError(f"training.precision is {name!r}; choose one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]
