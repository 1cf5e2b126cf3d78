"""Sizes of the models as constants, each with its source. Facts, not settings: a run names one of them."""

from dataclasses import dataclass
from typing import TypeVar

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.families.language_family import LanguagePreset


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

    def identity(self) -> str:
        """The sizes as a checkpoint keeps them, where the model has no name."""
        return str(self)


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
    return next((name for name, known in presets.items() if known == preset), preset.identity())
