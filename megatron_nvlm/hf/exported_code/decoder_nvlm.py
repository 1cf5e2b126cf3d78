"""The language model: layers of the Llama family, some of them with gated cross-attention.

    x = x + SelfAttention(norm(x))
    x = x + tanh(gate) * CrossAttention(norm(x), context)     in the layers that config.cross_attention lists
    x = x + MLP(norm(x))

Shapes: b samples, r decoder rows, k rows with those in the cache, c context rows, h hidden, n heads, g groups, d head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megatron_nvlm.models.families.rope_scaling import RopeScaling

from .configuration_nvlm import NVLMConfig
from .vision_nvlm import RMSNorm

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of a layer, [b, g, c, d] each."""


@dataclass(frozen=True)
class Context:
    """What cross-attention reads."""

    embeddings: Tensor | None
    """[b, c, h]; None where every layer has its keys and values already."""
    sees: Tensor
    """[b, 1, r, c] true where a row sees a context row; a row that sees nothing is all true here."""
    blind: Tensor
    """[b, 1, r, 1] true for rows that see nothing: cross-attention adds exactly zero to them."""

    @staticmethod
    def of(embeddings: Tensor | None, intervals: Tensor, rows: int) -> "Context":
        """From the range [start, end) of context rows that each row sees, [b, r, 2]; `rows` is c."""
        start, end = intervals[..., :1], intervals[..., 1:]
        place = torch.arange(rows, device=intervals.device)
        blind = end <= start
        sees = ((place >= start) & (place < end)) | blind  # a fully masked softmax would be NaN
        return Context(embeddings, sees[:, None], blind[:, None])


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """Grouped-query attention: [b, n, r, d] and [b, g, k, d] -> [b, r, n * d]; `mask` is true where a row sees a key."""
    if key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
    return output.transpose(1, 2).flatten(2)


def rotation(positions: Tensor, head: int, base: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary embedding, [b, 1, r, d] in float32, of positions [b, r]."""
    exponent = torch.arange(0, head, 2, dtype=torch.float32, device=positions.device) / head
    if scaling is None:
        angles = positions[:, None, :, None].float() / base**exponent
    else:
        angles = positions[:, None, :, None].float() * scaling.apply(1 / base**exponent, base)
    angles = torch.cat([angles, angles], dim=-1)
    scale = 1.0 if scaling is None else scaling.attention_scale
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """[b, n, r, d] turned by its positions; the halves of a head belong together."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine.to(x.dtype) + torch.cat([-second, first], dim=-1) * sine.to(x.dtype)


class SelfAttention(nn.Module):
    """Causal attention with grouped queries, rotary embedding and a key/value cache."""

    def __init__(self, config: NVLMConfig, layer: int) -> None:
        super().__init__()
        language = config.llm_config
        self.layer = layer
        self.heads, self.groups = language.num_attention_heads, language.num_key_value_heads
        self.head = config.head_size
        hidden, bias = language.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.heads * self.head, bias=bias)
        self.k_proj = nn.Linear(hidden, self.groups * self.head, bias=bias)
        self.v_proj = nn.Linear(hidden, self.groups * self.head, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head, hidden, bias=False)
        if config.query_key_norm:
            self.q_norm = RMSNorm(self.head, language.rms_norm_eps)
            self.k_norm = RMSNorm(self.head, language.rms_norm_eps)
        self.is_normed = config.query_key_norm

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, is_causal: bool, cache: Any
    ) -> Tensor:
        """[b, r, h] -> [b, r, h]; keys and values join those of the cache."""
        query = self.q_proj(x).unflatten(-1, (self.heads, self.head))
        key = self.k_proj(x).unflatten(-1, (self.groups, self.head))
        if self.is_normed:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query.transpose(1, 2), *turn), rotate(key.transpose(1, 2), *turn)
        value = self.v_proj(x).unflatten(-1, (self.groups, self.head)).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        return self.o_proj(attend(query, key, value, mask, is_causal))


class CrossAttention(nn.Module):
    """Attention to the context, without biases and positions; a scalar gate scales what it adds."""

    def __init__(self, config: NVLMConfig) -> None:
        super().__init__()
        cross, language = config.cross_attention or {}, config.llm_config
        self.heads, self.groups = cross["num_attention_heads"], cross["num_key_value_heads"]
        hidden = language.hidden_size
        self.head = config.head_size  # self-attention's, however many heads there are here
        self.q_proj = nn.Linear(hidden, self.heads * self.head, bias=False)
        self.k_proj = nn.Linear(hidden, self.groups * self.head, bias=False)
        self.v_proj = nn.Linear(hidden, self.groups * self.head, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head, hidden, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))
        normed = cross.get("qk_norm", False)
        self.q_norm: nn.Module = RMSNorm(self.head, language.rms_norm_eps) if normed else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.head, language.rms_norm_eps) if normed else nn.Identity()

    def project(self, context: Tensor) -> KeyValue:
        """[b, c, h] -> keys and values, once per prompt."""
        key = self.k_proj(context).unflatten(-1, (self.groups, self.head))
        value = self.v_proj(context).unflatten(-1, (self.groups, self.head))
        return self.k_norm(key).transpose(1, 2), value.transpose(1, 2)

    def forward(self, x: Tensor, key_value: KeyValue, context: Context) -> Tensor:
        """[b, r, h] -> what is added to the residual stream, [b, r, h]."""
        query = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.head))).transpose(1, 2)
        output = attend(query, *key_value, context.sees).masked_fill(context.blind[:, 0], 0)
        return torch.tanh(self.gate) * self.o_proj(output)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: NVLMConfig) -> None:
        super().__init__()
        hidden, inner = config.llm_config.hidden_size, config.llm_config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, r, h] -> [b, r, h]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Self-attention, [gated cross-attention], MLP."""

    def __init__(self, config: NVLMConfig, layer: int) -> None:
        super().__init__()
        hidden, eps = config.llm_config.hidden_size, config.llm_config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = SelfAttention(config, layer)
        self.has_cross_attention = config.cross_attention is not None and layer in config.cross_attention["layers"]
        if self.has_cross_attention:
            self.pre_cross_attn_layernorm = RMSNorm(hidden, eps)
            self.cross_attn = CrossAttention(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None,
        is_causal: bool,
        cache: Any,
        context: Context | None,
        key_value: KeyValue | None,
    ) -> tuple[Tensor, KeyValue | None]:
        """[b, r, h] -> ([b, r, h], this layer's keys and values of the context, if it has any)."""
        x = x + self.self_attn(self.input_layernorm(x), turn, mask, is_causal, cache)
        if self.has_cross_attention and context is not None:
            if key_value is None:
                assert context.embeddings is not None
                key_value = self.cross_attn.project(context.embeddings)
            x = x + self.cross_attn(self.pre_cross_attn_layernorm(x), key_value, context)
        return x + self.mlp(self.post_attention_layernorm(x)), key_value


class Decoder(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, config: NVLMConfig) -> None:
        super().__init__()
        language = config.llm_config
        self.rotary_base = float(language.rope_theta)
        self.head, self.rope_scaling = config.head_size, config.rope_scaling_settings
        self.embed_tokens = nn.Embedding(language.vocab_size, language.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(language.num_hidden_layers))
        self.norm = RMSNorm(language.hidden_size, language.rms_norm_eps)
        self.gradient_checkpointing = False  # transformers sets these two
        self._gradient_checkpointing_func: Any = None

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None,
        cache: Any,
        context: Context | None,
        key_values: tuple[KeyValue, ...] | None,
    ) -> tuple[list[Tensor], tuple[KeyValue, ...]]:
        """Embeddings [b, r, h] -> (hidden states: what enters each layer and, last, the normed output; the keys and
        values of the context in each layer with cross-attention).
        """
        turn = rotation(positions, self.head, self.rotary_base, self.rope_scaling)
        mask, is_causal = causal_mask(x, attention_mask, 0 if cache is None else cache.get_seq_length())
        known = iter(key_values or ())
        states, kept = [x], []
        for layer in self.layers:
            key_value = next(known, None) if layer.has_cross_attention else None
            parts = (x, turn, mask, is_causal, cache, context, key_value)
            if self.gradient_checkpointing and self.training and cache is None:
                x, key_value = self._gradient_checkpointing_func(layer.__call__, *parts)
            else:
                x, key_value = layer(*parts)
            states.append(x)
            if key_value is not None:
                kept.append(key_value)
        states[-1] = self.norm(x)
        return states, tuple(kept)


def causal_mask(x: Tensor, attention_mask: Tensor | None, rows_before: int) -> tuple[Tensor | None, bool]:
    """The mask of self-attention and whether it is plainly causal (then no mask is needed, which is faster).

    Args:
        x: [b, r, h].
        attention_mask: [b, k], 0 where a padding row stands, cached rows included; None if there is none.
        rows_before: in the cache.
    """
    rows = x.shape[1]
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if attention_mask is None and (rows == 1 or rows_before == 0):
        return None, rows > 1
    place = torch.arange(rows_before + rows, device=x.device)
    own = place[rows_before:, None]
    mask = (place <= own)[None, None]
    if attention_mask is not None:
        # A padding row sees itself, so that no row of scores is masked as a whole.
        mask = (mask & attention_mask[:, None, None, :].bool()) | (place == own)
    return mask, False


class LanguageModel(nn.Module):
    """The decoder with its output layer, which is the embedding where the two are tied."""

    def __init__(self, config: NVLMConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.llm_config.hidden_size, config.llm_config.vocab_size, bias=False)
        self.is_tied = config.tied_embeddings

    def logits(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., vocabulary]."""
        return nn.functional.linear(x, self.model.embed_tokens.weight) if self.is_tied else self.lm_head(x)
