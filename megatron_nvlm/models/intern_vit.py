"""InternViT: tiles to patch features (paper, section 4.1; sizes in presets.py).

Two families share one tower of Megatron-core layers: 6B (RMSNorm, RMSNorm over the full width of queries and keys, no
QKV bias) and 300M (LayerNorm, QKV bias, no query/key norm). Both scale each residual branch by a vector.
Shapes: t tiles, p patches of a tile, v vision hidden, n heads, d head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class LayerScaleAdd(torch.nn.Module):
    """residual + scale * (x + bias), one factor per channel (`ls1` and `ls2` of the release)."""

    def __init__(self, hidden_size: int, dtype: torch.dtype, init: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((hidden_size,), init, dtype=dtype))

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """The function that core's layer calls: ((x, bias), residual [p, t, v], dropout probability) -> [p, t, v]."""

        def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
            x, bias = x_with_bias
            if bias is not None:
                x = x + bias
            return residual + self.scale * torch.nn.functional.dropout(x, probability, training)

        return add


class FullWidthNormSelfAttention(SelfAttention):
    """Self-attention whose queries and keys are normalised over all heads together, before the split into heads."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        qk_norm: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config, submodules=submodules, layer_number=layer_number, **kwargs)
        width = dict(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.full_q_layernorm = build_module(qk_norm, **width)
        self.full_k_layernorm = build_module(qk_norm, **width)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """[p, t, v] -> query, key, value, each [p, t, n, d]."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        query = self.full_q_layernorm(query.flatten(2)).view_as(query)
        key = self.full_k_layernorm(key.flatten(2)).view_as(key)
        return query, key, value


class InternViTModel(MegatronModule):
    """Patch embedding, class token, learned positions and a tower of layers; no norm before or after the tower.

    Args:
        config: of the tower; its parallel sizes are 1 (each rank holds the whole encoder and encodes a share of tiles).
        layer_submodules: the tower's layers.
        tile_size: pixels along an edge of a tile. patch_size: pixels along an edge of a patch.
        groups: process groups of size one, so that core's linear layers are whole.
        replica: this rank among the ranks that hold the same encoder: (tensor-parallel rank, data-parallel rank).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_submodules: TransformerBlockSubmodules,
        tile_size: int,
        patch_size: int,
        groups: ProcessGroupCollection,
        replica: tuple[int, int],
    ) -> None:
        super().__init__(config=config)
        self.patches_per_side = tile_size // patch_size
        self.replica = replica
        positions = self.patches_per_side**2 + 1
        dtype = config.params_dtype
        self.conv1 = torch.nn.Conv2d(3, config.hidden_size, patch_size, stride=patch_size, dtype=dtype)
        self.class_token = torch.nn.Parameter(torch.empty(1, 1, config.hidden_size, dtype=dtype))
        self.position_embeddings = torch.nn.Embedding(positions, config.hidden_size, dtype=dtype)
        self.decoder = TransformerBlock(
            config, layer_submodules, post_layer_norm=False, pg_collection=groups, pre_process=True, post_process=False
        )
        for parameter in self.parameters():
            # Core marks the weights of its linear layers as split; here each rank holds them whole. The mark would count
            # them once per rank in the gradient norm. Each rank's gradient covers its own tiles: the sum is what counts.
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
            parameter.sum_over_tensor_parallel = True  # type: ignore[attr-defined]

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [t, 3, S, S] -> embeddings [t, 1 + p, v], the class token first."""
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(pixels), -1, -1), patches], dim=1)
        return tokens + self.position_embeddings.weight

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [t, 3, S, S] -> features of the last layer without the class token, [t, p, v]."""
        hidden = self.embed(pixels).transpose(0, 1).contiguous()
        hidden = self.decoder(hidden, attention_mask=None)
        return hidden[1:].transpose(0, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Core's, with this rank named among the holders of the same encoder, so that one of them writes it."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for value in nested_values(state):
            if isinstance(value, ShardedBase):
                value.replica_id = (0, *self.replica)
        return state
