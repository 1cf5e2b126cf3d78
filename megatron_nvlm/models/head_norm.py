"""RMSNorm of each attention head of queries and keys: Qwen3's, and that of cross-attention where it is asked for.

One weight [head size] serves the heads of all tensor-parallel ranks, each with its own heads. So its gradient is a sum over
ranks, whether the sequence is sharded or not.
"""

import copy
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_nvlm.models.gradient_marks import SUM_OVER_TENSOR_PARALLEL, mark


def mark_head_norm(norm: torch.nn.Module) -> None:
    """Say what the gradient of a head norm's weight still needs."""
    norm.weight.sequence_parallel = False  # type: ignore[union-attr, assignment]
    mark(norm.weight, SUM_OVER_TENSOR_PARALLEL)  # type: ignore[arg-type]


class HeadNormSelfAttention(SelfAttention):
    """Self-attention with norms of the heads in core's slots `q_layernorm` and `k_layernorm`."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        # Newer cores want the switch beside the norms. In the model's own configuration it would have core sum the gradients
        # of all norms of these names, which the mark does already.
        own = copy.copy(config)
        own.qk_layernorm = True
        super().__init__(own, *args, **kwargs)
        for norm in (self.q_layernorm, self.k_layernorm):
            mark_head_norm(norm)
