"""The families of vision models: a line each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.families.config_file import CONFIG_FILE, read_config, section_of
from megatron_nvlm.models.families.config_keys import COUNT, FLAG, NUMBER, TEXT, WHOLE, Meanings, check_keys
from megatron_nvlm.models.families.intern_vit import INTERN_VIT
from megatron_nvlm.models.families.siglip import SIGLIP
from megatron_nvlm.models.families.vision_family import VisionFamily, VisionPreset

VISION_FAMILIES: dict[str, VisionFamily] = {
    family.name: family
    for family in (
        INTERN_VIT,
        SIGLIP,
    )
}

VISION_PRESETS: dict[str, VisionPreset] = {
    name: preset for family in VISION_FAMILIES.values() for name, preset in family.presets.items()
}


_MEANINGS: Meanings = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"), COUNT),
    **dict.fromkeys(("image_size", "patch_size"), COUNT),
    **dict.fromkeys(("exported_class", "hidden_act", "norm_type"), TEXT),
    **dict.fromkeys(("initializer_factor", "layer_norm_eps"), NUMBER),
    **dict.fromkeys(("qk_normalization", "qkv_bias", "tie_word_embeddings", "vision_use_head"), FLAG),
    "num_channels": (lambda channels: channels == 3, "3"),
    "num_dummy_heads": WHOLE,
}


def vision_family_of(preset: VisionPreset) -> VisionFamily:
    """The family that a model is of."""
    return VISION_FAMILIES[preset.family]


def find_vision_family(config: Mapping[str, Any]) -> VisionFamily | None:
    """The family of the vision model that a config.json describes, alone or within another model's; None if it is none."""
    inner = config.get("vision_config", config)
    kind = str(inner.get("model_type", "")) if isinstance(inner, Mapping) else ""
    return next((family for family in VISION_FAMILIES.values() if kind.startswith(family.model_type)), None)


def vision_preset_of(folder: Path) -> VisionPreset:
    """Sizes of the vision model in a folder: its own, or the one within another model's.

    Raises:
        UserError: there is none, or it computes something that ours does not.
    """
    return read_vision(read_config(folder), str(folder / CONFIG_FILE))


def read_vision(config: Mapping[str, Any], where: str) -> VisionPreset:
    """Sizes of the vision model that a config.json describes, alone or within another model's.

    Args:
        where: the file, for messages.

    Raises:
        UserError: there is none, or it computes something that ours does not.
    """
    inner, family = section_of(config, "vision_config", where), find_vision_family(config)
    if family is None:
        known = ", ".join(f"{known.name} (model_type {known.model_type})" for known in VISION_FAMILIES.values())
        raise UserError(
            f"{where}: the vision model is of {inner.get('model_type')!r}, which is not supported; use one of {known}"
        )
    check_keys(inner, _MEANINGS, f"{where}: the vision model")
    return family.read(config, inner, where)


def describe_vision(preset: VisionPreset, dtype: str) -> dict[str, Any]:
    """The keys of a config.json of that model."""
    return {
        "hidden_size": preset.hidden_size,
        "image_size": preset.tile_size,
        "intermediate_size": preset.ffn_hidden_size,
        "layer_norm_eps": preset.layernorm_epsilon,
        "num_attention_heads": preset.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": preset.num_layers,
        "patch_size": preset.patch_size,
        "torch_dtype": dtype,
        "exported_class": vision_family_of(preset).exported_class,
        **vision_family_of(preset).describe(preset),
    }
