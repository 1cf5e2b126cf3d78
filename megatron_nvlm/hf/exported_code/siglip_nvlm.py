"""SigLIP: tiles to features. Names of the weights are those of transformers' SiglipVisionModel.

Shapes: t tiles, p patches of a tile, v vision hidden, n heads, d head size.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .configuration_nvlm import NVLMConfig
from .vision_nvlm import VisionEncoder, VisionMLP


class SiglipEmbeddings(nn.Module):
    """Patches with learned positions; pixels after the last whole patch are not seen."""

    def __init__(self, config: NVLMConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.patch_embedding = nn.Conv2d(3, vision.hidden_size, vision.patch_size, stride=vision.patch_size)
        self.position_embedding = nn.Embedding((vision.image_size // vision.patch_size) ** 2, vision.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [t, 3, S, S] -> [t, p, v]."""
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding.weight


class SiglipAttention(nn.Module):
    """Full attention with biases."""

    def __init__(self, config: NVLMConfig) -> None:
        super().__init__()
        vision = config.vision_config
        linear = partial(nn.Linear, vision.hidden_size, vision.hidden_size)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = linear(), linear(), linear(), linear()
        self.heads = vision.num_attention_heads

    def forward(self, x: Tensor) -> Tensor:
        """[t, p, v] -> [t, p, v]."""
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out_proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class SiglipLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: NVLMConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.self_attn = SiglipAttention(config)
        self.mlp = VisionMLP(config, approximate="tanh")
        self.layer_norm1 = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """[t, p, v] -> [t, p, v]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipModel(nn.Module):
    """Tiles to patch features of layer `select_layer`; the last layer's are normed."""

    def __init__(self, config: NVLMConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = VisionEncoder(config, SiglipLayer)
        self.post_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.depth = config.vision_depth
        self.is_whole = self.depth == vision.num_hidden_layers

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [t, 3, S, S] -> [t, p, v]."""
        features = self.encoder(self.embeddings(pixels), self.depth)
        return self.post_layernorm(features) if self.is_whole else features
