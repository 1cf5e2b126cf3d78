"""NVLM-D, X and H once more, in one process of plain PyTorch, written from the paper and for reading.

Nothing of the package is used: rows, masks, encoder, projector and decoder are made here from a sample's runs and from
weights under the package's names. One sample at a time, dense masks, no packing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tests.support.tiny import ImageRun, PlainSample, TextRun

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class PlainConfig:
    """Sizes, written out again on purpose."""

    variant: str
    layers: int = 4
    heads: int = 4
    groups: int = 2
    rotary_base: float = 10_000.0
    vision_layers: int = 3
    vision_heads: int = 4
    patch: int = 14
    interval: int = 2
    qk_norm: bool = False


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """[rows, heads, d] and a mask [rows, keys]; heads of key and value are repeated; a row without keys is zero."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    seen = mask.any(-1)
    scores = scores.masked_fill(~(mask | ~seen[:, None]), -math.inf)
    output = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    return (output * seen[:, None, None]).flatten(1)


def encode_tile(w: Weights, tile: Tensor, config: PlainConfig) -> Tensor:
    """uint8 [3, S, S] -> pixel-shuffled features [tokens, 4 * width]."""
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
    pixels = (tile.double() / 255 - mean) / std
    p, side = config.patch, tile.shape[-1] // config.patch
    patches = [pixels[:, i * p : (i + 1) * p, j * p : (j + 1) * p].flatten() for i in range(side) for j in range(side)]
    kernel = w["vision_model.conv1.weight"].flatten(1)
    x = torch.stack(patches) @ kernel.T + w["vision_model.conv1.bias"]
    x = torch.cat([w["vision_model.class_token"][0], x]) + w["vision_model.position_embeddings.weight"]
    for layer in range(config.vision_layers):
        x = encoder_layer(w, f"vision_model.decoder.layers.{layer}.", x, config)
    square = x[1:].reshape(side, side, -1)
    tokens = [
        torch.cat([square[i, j], square[i, j + 1], square[i + 1, j], square[i + 1, j + 1]])
        for i in range(0, side, 2)
        for j in range(0, side, 2)
    ]
    return torch.stack(tokens)


def encoder_layer(w: Weights, name: str, x: Tensor, config: PlainConfig) -> Tensor:
    heads = config.vision_heads
    y = rms_norm(x, w[name + "input_layernorm.weight"])
    mixed = (y @ w[name + "self_attention.linear_qkv.weight"].T).reshape(len(x), heads, 3, -1)
    query, key, value = mixed.unbind(2)
    query = rms_norm(query.flatten(1), w[name + "self_attention.full_q_layernorm.weight"]).view_as(query)
    key = rms_norm(key.flatten(1), w[name + "self_attention.full_k_layernorm.weight"]).view_as(key)
    everyone = torch.ones(len(x), len(x), dtype=torch.bool)
    y = attention(query, key, value, everyone) @ w[name + "self_attention.linear_proj.weight"].T
    x = x + w[name + "self_attn_bda.scale"] * (y + w[name + "self_attention.linear_proj.bias"])
    y = rms_norm(x, w[name + "pre_mlp_layernorm.weight"])
    y = functional.gelu(y @ w[name + "mlp.linear_fc1.weight"].T + w[name + "mlp.linear_fc1.bias"])
    y = y @ w[name + "mlp.linear_fc2.weight"].T + w[name + "mlp.linear_fc2.bias"]
    return x + w[name + "mlp_bda.scale"] * y


def project(w: Weights, features: Tensor, config: PlainConfig) -> Tensor:
    if config.variant == "x":
        return features @ w["vision_projection.linear.weight"].T
    weight, bias = w["vision_projection.layernorm.weight"], w["vision_projection.layernorm.bias"]
    y = functional.layer_norm(features, weight.shape, weight, bias, 1e-5)
    y = functional.gelu(y @ w["vision_projection.mlp.linear_fc1.weight"].T)
    return y @ w["vision_projection.mlp.linear_fc2.weight"].T


@dataclass
class Rows:
    """A sample's rows as they grow: embeddings, context, what each row sees, and targets."""

    decoder: list[Tensor]
    context: list[Tensor]
    sees: list[tuple[int, int]]
    ids: list[int]
    is_target: list[bool]

    def add(self, embeddings: Tensor, sees: tuple[int, int], ids: list[int], is_target: bool) -> None:
        self.decoder += list(embeddings)
        self.sees += [sees] * len(embeddings)
        self.ids += ids
        self.is_target += [is_target] * len(embeddings)


def lay_out(w: Weights, sample: PlainSample, config: PlainConfig) -> Rows:
    table = w["language_model.embedding.word_embeddings.weight"]
    rows = Rows([], [], [], [], [])
    for run in sample.runs:
        if isinstance(run, TextRun):
            rows.add(table[run.ids], (0, len(rows.context)), run.ids, run.is_target)
            continue
        assert isinstance(run, ImageRun)
        vision = [project(w, encode_tile(w, tile, config), config) for tile in run.tiles]
        add_image(rows, table, vision, run.tag_ids, config)
    return rows


def add_image(rows: Rows, table: Tensor, vision: list[Tensor], tags: list[list[int]], config: PlainConfig) -> None:
    def placeholder(tokens: Tensor) -> list[int]:
        return [0] * len(tokens)

    if config.variant == "d":
        for tokens, tag in zip(vision, tags, strict=True):
            rows.add(table[tag], (0, 0), tag, False)
            rows.add(tokens, (0, 0), placeholder(tokens), False)
    elif config.variant == "x":
        for tokens, tag in zip(vision, tags, strict=True):
            start = len(rows.context)
            rows.context += list(tokens)
            rows.add(table[tag], (start, len(rows.context)), tag, False)
    else:
        for tokens, tag in zip(vision[:-1], tags[:-1], strict=True):
            rows.context += [*table[tag], *tokens]
        seen = (0, len(rows.context))
        rows.add(table[tags[-1]], seen, tags[-1], False)
        rows.add(vision[-1], seen, placeholder(vision[-1]), False)


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of [rows, heads, d], halves rotated against each other."""
    half = x.shape[-1] // 2
    frequency = 1 / base ** (torch.arange(half, dtype=torch.float32) / half)  # float32 angles, as in the original
    angle = torch.outer(torch.arange(len(x), dtype=torch.float32), frequency)[:, None]
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def decoder_layer(w: Weights, name: str, x: Tensor, context: Tensor, mask: Tensor, config: PlainConfig) -> Tensor:
    per_group = config.heads // config.groups
    y = rms_norm(x, w[name + "input_layernorm.weight"])
    mixed = y @ w[name + "self_attention.linear_qkv.weight"].T + w[name + "self_attention.linear_qkv.bias"]
    mixed = mixed.reshape(len(x), config.groups, per_group + 2, -1)
    query = rotate(mixed[:, :, :per_group].flatten(1, 2), config.rotary_base)
    key, value = rotate(mixed[:, :, per_group], config.rotary_base), mixed[:, :, per_group + 1]
    causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    x = x + attention(query, key, value, causal) @ w[name + "self_attention.linear_proj.weight"].T
    if name + "cross_attn_bda.gate" in w:
        y = rms_norm(x, w[name + "pre_cross_attn_layernorm.weight"])
        query = (y @ w[name + "cross_attention.linear_q.weight"].T).reshape(len(x), config.heads, -1)
        both = (context @ w[name + "cross_attention.linear_kv.weight"].T).reshape(len(context), config.groups, 2, -1)
        key, value = both[:, :, 0], both[:, :, 1]
        if config.qk_norm:
            query = rms_norm(query, w[name + "cross_attention.q_layernorm.weight"])
            key = rms_norm(key, w[name + "cross_attention.k_layernorm.weight"])
        y = attention(query, key, value, mask) @ w[name + "cross_attention.linear_proj.weight"].T
        x = x + torch.tanh(w[name + "cross_attn_bda.gate"]) * y
    y = rms_norm(x, w[name + "pre_mlp_layernorm.weight"])
    gate, up = (y @ w[name + "mlp.linear_fc1.weight"].T).chunk(2, -1)
    return x + (functional.silu(gate) * up) @ w[name + "mlp.linear_fc2.weight"].T


def forward(w: Weights, sample: PlainSample, config: PlainConfig) -> tuple[Tensor, Tensor]:
    """(logits [rows, vocabulary], sum of the losses of the targets)."""
    rows = lay_out(w, sample, config)
    x = torch.stack(rows.decoder)
    context = torch.stack(rows.context) if rows.context else x[:1] * 0
    mask = torch.zeros(len(x), len(context), dtype=torch.bool)
    for row, (start, end) in enumerate(rows.sees):
        mask[row, start:end] = True
    for layer in range(config.layers):
        x = decoder_layer(w, f"language_model.decoder.layers.{layer}.", x, context, mask, config)
    x = rms_norm(x, w["language_model.decoder.final_layernorm.weight"])
    logits = x @ w["language_model.output_layer.weight"].T
    log_likelihood = logits.log_softmax(-1)
    loss = logits.new_zeros(())
    for row in range(len(rows.ids) - 1):
        if rows.is_target[row + 1]:
            loss = loss - log_likelihood[row, rows.ids[row + 1]]
    return logits, loss
