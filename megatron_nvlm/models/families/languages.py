"""The families of language models: a line each."""

from megatron_nvlm.models.families.language_family import LanguageFamily, LanguagePreset
from megatron_nvlm.models.families.llama import LLAMA
from megatron_nvlm.models.families.mistral import MISTRAL
from megatron_nvlm.models.families.qwen2 import QWEN2
from megatron_nvlm.models.families.qwen3 import QWEN3

LANGUAGE_FAMILIES: dict[str, LanguageFamily] = {
    family.name: family
    for family in (
        QWEN2,
        LLAMA,
        MISTRAL,
        QWEN3,
    )
}

LANGUAGE_PRESETS: dict[str, LanguagePreset] = {
    name: preset for family in LANGUAGE_FAMILIES.values() for name, preset in family.presets.items()
}


def family_of(preset: LanguagePreset) -> LanguageFamily:
    """The family that a model is of."""
    return LANGUAGE_FAMILIES[preset.family]
