"""InternViT and pixel shuffle: tiles to features. Names of the weights are the public releases'.

Shapes: t tiles, p patches of a tile, v vision hidden, n heads, d head size.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from .configuration_nvlm import NVLMConfig


class RMSNorm(nn.Module):
    """RMSNorm whose mean runs over `width` channels; statistics in at least float32."""

    def __init__(self, size: int, eps: float, width: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.width = eps, width or size

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = wide.pow(2).sum(-1, keepdim=True) / self.width
        return self.weight * (wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype)


class VisionEmbeddings(nn.Module):
    """Patches, the class token in front, learned positions."""

    def __init__(self, config: NVLMConfig) -> None:
        super().__init__()
        vision = config.vision_config
        positions = (vision.image_size // vision.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, vision.hidden_size))
        self.patch_embedding = nn.Conv2d(3, vision.hidden_size, vision.patch_size, stride=vision.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, positions, vision.hidden_size))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [t, 3, S, S] -> [t, 1 + p, v]."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(pixels), -1, -1), patches], dim=1) + self.position_embedding


class VisionAttention(nn.Module):
    """Full attention; the 6B family normalises queries and keys over all heads together."""

    def __init__(self, config: NVLMConfig) -> None:
        super().__init__()
        vision = config.vision_config
        head = vision.hidden_size // vision.num_attention_heads
        self.heads = vision.num_attention_heads + config.num_dummy_heads
        inner = self.heads * head
        self.qkv = nn.Linear(vision.hidden_size, 3 * inner, bias=bool(getattr(vision, "qkv_bias", False)))
        self.proj = nn.Linear(inner, vision.hidden_size)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if getattr(vision, "qk_normalization", False):
            # The mean runs over the real heads' channels; padding heads are zero and add nothing to the sum.
            self.q_norm = RMSNorm(inner, vision.layer_norm_eps, vision.hidden_size)
            self.k_norm = RMSNorm(inner, vision.layer_norm_eps, vision.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[t, p, v] -> [t, p, v]."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        parts = (self.q_norm(query), self.k_norm(key), value)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Linear, GELU (exact, or approximated by tanh), linear."""

    def __init__(self, config: NVLMConfig, approximate: str = "none") -> None:
        super().__init__()
        vision, self.approximate = config.vision_config, approximate
        self.fc1 = nn.Linear(vision.hidden_size, vision.intermediate_size)
        self.fc2 = nn.Linear(vision.intermediate_size, vision.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[t, p, v] -> [t, p, v]."""
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate=self.approximate))


class VisionLayer(nn.Module):
    """Pre-norm attention and MLP; a vector scales what each adds."""

    def __init__(self, config: NVLMConfig) -> None:
        super().__init__()
        vision = config.vision_config
        norm = RMSNorm if vision.norm_type == "rms_norm" else nn.LayerNorm
        scale = getattr(vision, "initializer_factor", 0.1)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.norm1 = norm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.norm2 = norm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.ls1 = nn.Parameter(torch.full((vision.hidden_size,), float(scale)))
        self.ls2 = nn.Parameter(torch.full((vision.hidden_size,), float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        """[t, p, v] -> [t, p, v]."""
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.ls2 * self.mlp(self.norm2(x))


class VisionEncoder(nn.Module):
    """A tower of layers of one kind; no norm before or after it."""

    def __init__(self, config: NVLMConfig, layer: Callable[[NVLMConfig], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(config) for _ in range(config.vision_config.num_hidden_layers))

    def forward(self, x: Tensor, depth: int) -> Tensor:
        """[t, p, v] through the first `depth` layers."""
        for layer in self.layers[:depth]:
            x = layer(x)
        return x


class VisionModel(nn.Module):
    """Tiles to patch features of layer `select_layer`, without the class token."""

    def __init__(self, config: NVLMConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config, VisionLayer)
        self.depth = config.vision_depth

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [t, 3, S, S] -> [t, p, v]."""
        return self.encoder(self.embeddings(pixels), self.depth)[:, 1:]


def pixel_shuffle(features: Tensor) -> Tensor:
    """[t, p, v] -> [t, p / 4, 4 v]: each 2x2 block of patches becomes one token, row by row (`ps_version` v2).

    Channels are top-left, top-right, bottom-left, bottom-right. An odd grid gets zeros on the right and below first.
    """
    tiles, patches, width = features.shape
    side = int(patches**0.5)
    if side % 2:
        features, side = pad(features.view(tiles, side, side, width), (0, 0, 0, 1, 0, 1)), side + 1
    half = side // 2
    blocks = features.view(tiles, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(tiles, half * half, 4 * width)


def vision_class_of(config: NVLMConfig) -> Any:
    """The class of the vision model's family, which the folder's config.json names; InternViT's where it does not."""
    module, name = getattr(config.vision_config, "exported_class", "vision_nvlm.VisionModel").split(".")
    return getattr(import_module(f".{module}", __package__), name)
