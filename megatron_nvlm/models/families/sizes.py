"""Sizes of the models as constants, each with its source. Facts, not settings: a run names one of them."""

from dataclasses import dataclass
from typing import TypeVar

from megatron_nvlm.errors import UserError


@dataclass(frozen=True)
class LanguagePreset:
    """A language model of the Llama family: RMSNorm, rotary embedding, grouped queries, SwiGLU."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    """Rows of the embedding as stored, padding included."""
    rotary_base: int
    qkv_bias: bool
    tied_embeddings: bool = False
    layernorm_epsilon: float = 1e-6


@dataclass(frozen=True)
class VisionPreset:
    """An InternViT; `normalization` is RMSNorm for the 6B family, LayerNorm for the 300M one."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    normalization: str
    qk_norm: bool
    qkv_bias: bool
    tile_size: int = 448
    patch_size: int = 14
    layernorm_epsilon: float = 1e-6
    layer_scale_init: float = 0.1
    """Start of both layer-scales (`initializer_factor` of the public models)."""

    @property
    def patches_per_tile(self) -> int:
        """Patch tokens of a tile, without the class token."""
        return (self.tile_size // self.patch_size) ** 2

    @property
    def tokens_per_tile(self) -> int:
        """Vision tokens of a tile after pixel shuffle."""
        return self.patches_per_tile // 4


LANGUAGE_PRESETS: dict[str, LanguagePreset] = {
    # config.json of Qwen/Qwen2-72B-Instruct; NVLM's final models (paper, section 4.1)
    "qwen2_72b": LanguagePreset(80, 8192, 29568, 64, 8, 152064, 1_000_000, qkv_bias=True),
    # config.json of NousResearch/Nous-Hermes-2-Yi-34B; NVLM's ablations (paper, section 4.1)
    "yi_34b": LanguagePreset(60, 7168, 20480, 56, 8, 64000, 5_000_000, qkv_bias=False, layernorm_epsilon=1e-5),
    # config.json of Qwen/Qwen2-7B-Instruct; not a model of the paper
    "qwen2_7b": LanguagePreset(28, 3584, 18944, 28, 4, 152064, 1_000_000, qkv_bias=True),
    # ours, for the demo on a laptop: Qwen2's form with a vocabulary cut to 1024 tokens and room for special ones
    "tiny": LanguagePreset(4, 128, 352, 4, 2, 1152, 10_000, qkv_bias=True),
}

VISION_PRESETS: dict[str, VisionPreset] = {
    # config.json of OpenGVLab/InternViT-6B-448px-V1-5 (paper, section 4.1)
    "internvit_6b": VisionPreset(45, 3200, 12800, 25, "RMSNorm", qk_norm=True, qkv_bias=False),
    # config.json of OpenGVLab/InternViT-300M-448px; not a model of the paper
    "internvit_300m": VisionPreset(24, 1024, 4096, 16, "LayerNorm", qk_norm=False, qkv_bias=True),
    # ours, for the demo on a laptop: the 6B family's form, tiles of 56 pixels; layer-scales at 1 to train from scratch
    "tiny": VisionPreset(3, 96, 256, 4, "RMSNorm", qk_norm=True, qkv_bias=False, tile_size=56, layer_scale_init=1.0),
}


Preset = TypeVar("Preset", LanguagePreset, VisionPreset)


def find_preset(presets: dict[str, Preset], name: str, key: str) -> Preset:
    """The preset of that name; `key` is the configuration key that asked for it."""
    if name not in presets:
        raise UserError(
            f"{key} is {name!r}, which is no preset and no folder; choose one of {', '.join(presets)}, or name a Hugging "
            "Face folder with a config.json"
        )
    return presets[name]


def name_of(presets: dict[str, Preset], preset: Preset) -> str:
    """The name of a preset, or its sizes where it has none: what a checkpoint says it is of."""
    return next((name for name, known in presets.items() if known == preset), str(preset))
