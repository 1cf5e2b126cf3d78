"""Which class fills each kind of slot: `local` runs anywhere on PyTorch, `te` takes Transformer Engine's on GPUs.

Parameter names and shapes are the same in both (norms are never fused into the linear layer after them), so a
checkpoint of one backend loads into the other.
Shapes: s decoder tokens, b batch, n query heads, g key/value groups, d head size, h hidden.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_nvlm.errors import UserError
from megatron_nvlm.ops.causal_attention import causal_attention
from megatron_nvlm.ops.interval_attention import interval_attention

BACKENDS = ("local", "te")
TE_DTYPES = (torch.bfloat16, torch.float16)
"""What Transformer Engine's kernels of attention compute in; 2.1 has no other form for ragged sequences, 2.20 a slow one."""


def check_backend_is_installed(backend: str) -> None:
    """Raise UserError if the classes of a backend cannot be had on this machine."""
    if backend == "te" and find_spec("transformer_engine") is None:
        raise UserError(
            "model.backend is te and Transformer Engine is not installed; install transformer-engine, or set "
            "model.backend=local"
        )


class RMSNorm(torch.nn.Module):
    """RMSNorm with statistics in float32 (float64 for float64 input).

    Core's torch norm refuses sequence parallelism; this one marks its weight, so that its gradient, a sum over
    sequence shards, is reduced over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; shape and dtype stay."""
        if x.is_cuda and x.dtype == self.weight.dtype:  # one kernel, with statistics in float32
            return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


class LayerNorm(torch.nn.Module):
    """LayerNorm that marks its parameters for sequence parallelism, as `RMSNorm` does."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; shape and dtype stay."""
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class TorchCoreAttention(torch.nn.Module):
    """Self-attention for core's `core_attention` slot by PyTorch: grouped queries, ragged sequences, dense tiles."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        With `packed_seq_params` (models/language_model.py): query [s, 1, n, d], key and value [s, 1, g, d], causal inside
        each sample -> [s, 1, n * d].
        Without: query [s, b, n, d], key and value [s, b, g, d]; every token sees every token of its own batch entry (the
        patches of a tile) -> [s, b, n * d].
        """
        dropout = self.dropout if self.training else 0.0
        if packed_seq_params is not None:
            one_batch = (query[:, 0], key[:, 0], value[:, 0])
            output = causal_attention(*one_batch, packed_seq_params.boundaries, self.scale, dropout)  # [s, n, d]
            return output.flatten(1)[:, None]  # [s, 1, n * d]
        output = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),  # [b, n, s, d]
            key.permute(1, 2, 0, 3),  # [b, g, s, d]
            value.permute(1, 2, 0, 3),  # [b, g, s, d]
            dropout_p=dropout,
            scale=self.scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return output.permute(2, 0, 1, 3).flatten(2)  # [s, b, n * d]


class IntervalCoreAttention(torch.nn.Module):
    """The `core_attention` of gated cross-attention: the mask is one range of context tokens per decoder token."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.dropout = config.attention_dropout

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """query [s, 1, n, d], key and value [c, 1, g, d] -> [s, 1, n * d].

        Args:
            attention_mask: [s + blocks, 2], the intervals and after them what `block_rows` says of them
                (MicroBatch.context_mask).
        """
        dropout = self.dropout if self.training else 0.0
        one_batch = (query[:, 0], key[:, 0], value[:, 0])
        intervals, blocks = attention_mask.split([len(query), len(attention_mask) - len(query)])
        output = interval_attention(*one_batch, intervals, self.scale, dropout, blocks)  # [s, n, d]
        return output.flatten(1)[:, None]  # [s, 1, n * d]


@dataclass(frozen=True)
class Backend:
    """One class per kind of slot."""

    column_parallel_linear: type
    row_parallel_linear: type
    rms_norm: type
    layer_norm: type
    core_attention: type
    interval_attention: type = IntervalCoreAttention


_LOCAL = Backend(ColumnParallelLinear, RowParallelLinear, RMSNorm, LayerNorm, TorchCoreAttention)


def get_backend(name: str) -> Backend:
    """The classes of a backend.

    Raises:
        UserError: the name is unknown, or Transformer Engine cannot be imported.
    """
    if name == "local":
        return _LOCAL
    if name != "te":
        raise UserError(f"model.backend is {name!r}; choose one of {', '.join(BACKENDS)}")
    try:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TEDotProductAttention,
            TENorm,
            TERowParallelLinear,
        )

        return Backend(TEColumnParallelLinear, TERowParallelLinear, TENorm, TENorm, TEDotProductAttention)
    except (ImportError, RuntimeError) as error:  # an incomplete installation raises RuntimeError
        raise UserError(
            f"model.backend is 'te' but Transformer Engine cannot be imported ({error}); "
            "install the extra 'gpu' on a CUDA machine, or set model.backend=local"
        ) from error


def without_bias(linear: type) -> type:
    """A linear class that never has a bias, for slots whose caller decides the bias by one flag for the whole layer."""

    def __init__(self: Any, *args: Any, bias: bool = False, **kwargs: Any) -> None:
        linear.__init__(self, *args, bias=False, **kwargs)  # type: ignore[misc]

    return type(f"{linear.__name__}WithoutBias", (linear,), {"__init__": __init__, "__doc__": without_bias.__doc__})
