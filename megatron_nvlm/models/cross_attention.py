"""Gated cross-attention, the layer part that NVLM-X and NVLM-H add: y = x + tanh(gate) * Wo Attn(Wq norm(x), Wk c, Wv c).

The paper names gated cross-attention (sections 4.3, 4.4) and leaves its inside open; every choice here is ours and is
listed in docs/choices.md. Both classes fill slots that Megatron-core's TransformerLayer has between self-attention and
MLP.
Shapes: s decoder tokens, c context tokens, n query heads, g groups, d head size, h hidden.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.attention import Attention, CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.head_norm import mark_head_norm
from megatron_nvlm.ops.gated_add import gated_add


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Where gated cross-attention stands and how it is made. The paper gives the number of layers and nothing else."""

    interval: int = 8
    """Every N-th layer has cross-attention: 6 for the 34B, 8 for the 72B model (paper, section 4.5)."""
    offset: int | None = None
    """Which layer of each group, from 0. The paper does not say; None is the last."""
    num_attention_heads: int | None = None
    """The paper does not say; None takes the language model's."""
    num_query_groups: int | None = None
    """The paper does not say; None takes the language model's."""
    qk_norm: bool = False
    """RMSNorm on each head of queries and keys, as in Llama 3.2. The paper does not say."""
    gate_init: float = 0.0
    """Start of the scalar gate; at 0 the model starts as its language model."""

    def layers(self, num_layers: int) -> frozenset[int]:
        """The numbers, from 0, of the layers with cross-attention."""
        offset = self.interval - 1 if self.offset is None else self.offset
        if self.interval < 1 or not 0 <= offset < self.interval:
            raise UserError(
                f"model.cross_attention: offset {offset} must lie between 0 and interval - 1 (interval is {self.interval})"
            )
        return frozenset(range(offset, num_layers, self.interval))


class GroupedQueryCrossAttention(Attention):
    """Cross-attention with grouped queries (core's own refuses them), no bias and no rotary embedding."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossAttentionSubmodules,
        layer_number: int,
        cross_attention: CrossAttentionConfig,
        qk_norm: Any = None,
        attn_mask_type: AttnMaskType = AttnMaskType.no_mask,
        **kwargs: Any,
    ) -> None:
        own = copy.copy(config)
        own.num_attention_heads = cross_attention.num_attention_heads or config.num_attention_heads
        own.num_query_groups = cross_attention.num_query_groups or config.num_query_groups
        own.add_bias_linear = False
        own.softmax_scale = None  # a scaled rotary embedding is of self-attention alone
        super().__init__(
            config=own,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="cross",
            **kwargs,
        )
        common = dict(
            config=own,
            init_method=own.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )
        self.linear_q = build_module(submodules.linear_q, own.hidden_size, self.query_projection_size, **common)
        self.linear_kv = build_module(submodules.linear_kv, own.hidden_size, 2 * self.kv_projection_size, **common)
        self.q_layernorm = self._head_norm(qk_norm)
        self.k_layernorm = self._head_norm(qk_norm)

    def _head_norm(self, norm: Any) -> torch.nn.Module | None:
        if norm is None:
            return None
        config = self.config
        module = build_module(
            norm, config=config, hidden_size=self.hidden_size_per_attention_head, eps=config.layernorm_epsilon
        )
        mark_head_norm(module)
        return module

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[s, 1, h] and [c, 1, h] -> query [s, 1, n, d], key and value [c, 1, g, d]."""
        head = self.hidden_size_per_attention_head
        query, _ = self.linear_q(hidden_states)  # [s, 1, n * d]
        query = query.unflatten(-1, (self.num_attention_heads_per_partition, head))  # [s, 1, n, d]
        key_value, _ = self.linear_kv(key_value_states)  # [c, 1, g * 2 d]
        key_value = key_value.unflatten(-1, (self.num_query_groups_per_partition, 2 * head))  # [c, 1, g, 2 d]
        key, value = key_value.split(head, dim=-1)  # [c, 1, g, d]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key.contiguous(), value.contiguous()


class TanhGatedAdd(torch.nn.Module):
    """residual + tanh(gate) * dropout(x), the scalar gate starting at 0 (Flamingo's form; the paper does not say)."""

    def __init__(self, config: TransformerConfig, gate_init: float = 0.0) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.full((1,), gate_init, dtype=config.params_dtype))
        # Under sequence parallelism each rank sees a shard of the tokens, and the gate's gradient is the sum over shards.
        self.gate.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """The function that core's layer calls: ((x, bias), residual [s, 1, h], dropout probability) -> [s, 1, h]."""

        def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
            x, bias = x_with_bias
            return gated_add(x, bias, residual, self.gate, probability, training)

        return add
