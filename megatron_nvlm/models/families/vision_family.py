"""What a family of vision models is: a record of what its towers have, and of its folders."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_nvlm.image.pixels import PixelStatistics
from megatron_nvlm.models.weight_rows import Row


@dataclass(frozen=True)
class VisionPreset:
    """Sizes of one vision model; `family` says the rest."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    normalization: str
    """RMSNorm or LayerNorm."""
    qk_norm: bool
    """RMSNorm of queries and keys over all heads together."""
    qkv_bias: bool
    tile_size: int = 448
    patch_size: int = 14
    layernorm_epsilon: float = 1e-6
    layer_scale_init: float = 0.1
    """Start of both layer-scales (`initializer_factor` of the public models), where the family has them."""
    family: str = "intern_vit"
    """A name of VISION_FAMILIES."""

    @property
    def patches_per_side(self) -> int:
        """Patches along an edge of a tile; pixels after the last whole one are not seen."""
        return self.tile_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        """Patch tokens of a tile, without the class token."""
        return self.patches_per_side**2

    @property
    def tokens_per_tile(self) -> int:
        """Vision tokens of a tile after pixel shuffle, which fills an odd grid up with zeros (ops/pixel_shuffle.py)."""
        return ((self.patches_per_side + 1) // 2) ** 2

    @property
    def shuffled_size(self) -> int:
        """Channels of a vision token before the projector."""
        return 4 * self.hidden_size

    def identity(self) -> str:
        """The sizes as a checkpoint keeps them, where the model has no name; those of before families lack `family`."""
        kept = {each.name: getattr(self, each.name) for each in fields(self)}
        if kept["family"] == "intern_vit":
            del kept["family"]
        return f"VisionPreset({', '.join(f'{name}={value!r}' for name, value in kept.items())})"


@dataclass(frozen=True)
class VisionFamily:
    """A family of pre-norm vision transformers with learned positions.

    A new family is a file with such a record and a line in VISION_FAMILIES.
    """

    name: str
    model_type: str
    """What `model_type` in config.json begins with."""
    read: Callable[[Mapping[str, Any], Mapping[str, Any], str], VisionPreset]
    """(the whole config.json, the keys of the vision model, the file for messages) -> sizes; UserError for others."""
    describe: Callable[[VisionPreset], dict[str, Any]]
    """The keys of config.json that are not every family's."""
    rows: Callable[[VisionPreset, str, int], list[Row]]
    """(sizes, prefix of the folder's names, heads of zeros that the folder has after the real ones) -> the weights."""
    has_class_token: bool
    has_layer_scale: bool
    """Whether a vector scales what each half of a layer adds."""
    has_final_norm: bool
    """Whether a norm stands after the last layer."""
    activation: str
    """A name of ACTIVATIONS (models/core_config.py), as Hugging Face spells it."""
    pixels: PixelStatistics
    exported_class: str
    """Its module and class in hf/exported_code/, for folders that transformers reads."""
    own_prefix: str = ""
    """What names begin with in some folders of the vision model alone."""
    unused_names: tuple[str, ...] = ()
    """What names of weights begin with that NVLM has no use for."""
    presets: Mapping[str, VisionPreset] = field(default_factory=dict)
    """Its models by name."""

    def tower_tokens(self, preset: VisionPreset) -> int:
        """Tokens of a tile in the tower: its patches, and the class token."""
        return preset.patches_per_tile + self.has_class_token
