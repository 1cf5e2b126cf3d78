"""The vision model: tiles to patch features (paper, section 4.1), a tower of Megatron-core layers.

What a tower has is said by its family's record (families/): class token, layer-scales, norms, activation.
Shapes: t tiles, p patches of a tile, v vision hidden, n heads, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_nvlm.models.families.vision_family import VisionPreset
from megatron_nvlm.models.families.visions import vision_family_of
from megatron_nvlm.models.gradient_marks import mark, mark_whole_copy
from megatron_nvlm.models.padding import Padding, SplitRMSNorm, shard_evenly, shard_heads
from megatron_nvlm.models.sharding import find_split


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
        self.full_q_layernorm = self._full_width_norm(qk_norm)
        self.full_k_layernorm = self._full_width_norm(qk_norm)

    def _full_width_norm(self, qk_norm: Any) -> torch.nn.Module:
        config, group = self.config, self.pg_collection.tp
        if group.size() > 1:
            local_width = self.num_attention_heads_per_partition * self.hidden_size_per_attention_head
            return SplitRMSNorm(config, config.hidden_size, local_width, config.layernorm_epsilon, group)
        return build_module(qk_norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """[p, t, v] -> query, key, value, each [p, t, n, d]."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        query = self.full_q_layernorm(query.flatten(2)).view_as(query)  # [p, t, n, d]
        key = self.full_k_layernorm(key.flatten(2)).view_as(key)  # [p, t, n, d]
        return query, key, value


@dataclass(frozen=True)
class Holder:
    """Which part of which copy of the encoder a rank holds.

    Args:
        heads: None where the rank holds the encoder whole.
        stage, tensor_rank, tensor_ranks, data_rank: place of the rank in its groups.
        sum_gradients_over: the mark of models/gradient_marks.py that names the ranks which encode different tiles with
            their copies of the encoder; None where all encode the same.
    """

    heads: Padding | None
    stage: int
    tensor_rank: int
    tensor_ranks: int
    data_rank: int
    sum_gradients_over: str | None


class VisionModel(MegatronModule):
    """Patch embedding, learned positions and a tower of layers; class token and last norm where the family has them.

    Args:
        config: of the tower.
        layer_submodules: the tower's layers, and its last norm.
        preset: its sizes.
        groups: process groups of the tower; of size one where each rank holds it whole.
        holder: what this rank holds.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_submodules: TransformerBlockSubmodules,
        preset: VisionPreset,
        groups: ProcessGroupCollection,
        holder: Holder,
    ) -> None:
        super().__init__(config=config)
        self.preset, self.family = preset, vision_family_of(preset)
        self.holder = holder
        positions = self.family.tower_tokens(preset)
        dtype, patch = config.params_dtype, preset.patch_size
        self.conv1 = torch.nn.Conv2d(3, config.hidden_size, patch, stride=patch, dtype=dtype)
        if self.family.has_class_token:
            self.class_token = torch.nn.Parameter(torch.empty(1, 1, config.hidden_size, dtype=dtype))
        self.position_embeddings = torch.nn.Embedding(positions, config.hidden_size, dtype=dtype)
        self.decoder = TransformerBlock(
            config,
            layer_submodules,
            post_layer_norm=self.family.has_final_norm,
            pg_collection=groups,
            pre_process=True,
            post_process=self.family.has_final_norm,
        )
        for parameter in self.parameters():
            mark_whole_copy(parameter, is_first=holder.stage == 0)
            if holder.sum_gradients_over is not None:  # each rank's gradient covers its own tiles
                mark(parameter, holder.sum_gradients_over)

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [t, 3, S, S] -> embeddings [t, 1 + p, v], the class token first; [t, p, v] without one."""
        tokens: Tensor = self.conv1(pixels).flatten(2).transpose(1, 2)  # [t, p, v]
        if self.family.has_class_token:
            tokens = torch.cat([self.class_token.expand(len(pixels), -1, -1), tokens], dim=1)  # [t, 1 + p, v]
        return tokens + self.position_embeddings.weight

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [t, 3, S, S] -> features of the last layer without the class token, [t, p, v]."""
        hidden = self.embed(pixels).transpose(0, 1).contiguous()  # [1 + p, t, v]
        hidden = self.decoder(hidden, attention_mask=None)
        return hidden[int(self.family.has_class_token) :].transpose(0, 1)  # [t, p, v]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """As Megatron-core's, but with replica ids, so that one rank writes each copy."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for key, value in state.items():
            if isinstance(value, ShardedTensor):
                state[key] = self._sharded(value)
            elif isinstance(value, ShardedBase):
                value.replica_id = (self.holder.stage, self.holder.tensor_rank, self.holder.data_rank)
        return state

    def _sharded(self, value: ShardedTensor) -> ShardedBase:
        holder = self.holder
        if holder.heads is None:
            return replace(value, replica_id=(holder.stage, holder.tensor_rank, holder.data_rank))
        split = find_split(value.key, holder.heads)
        place = (holder.tensor_rank, holder.tensor_ranks, holder.data_rank)
        if split is not None and split.padding is not None:
            return shard_heads(value, split.dim, split.padding, *place)
        return shard_evenly(value, None if split is None else split.dim, *place)
