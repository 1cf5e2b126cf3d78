"""A model's sizes by name."""

from typing import TypeVar

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.families.vision_family import VisionPreset

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
