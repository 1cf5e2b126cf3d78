"""Mistral: Llama's layers; models with a sliding window of attention are refused."""

from megatron_nvlm.models.families.language_family import LanguageFamily, LanguagePreset

MISTRAL = LanguageFamily(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    presets={
        # config.json of mistralai/Mistral-7B-Instruct-v0.3; not a model of the paper
        "mistral_7b": LanguagePreset(32, 4096, 14336, 32, 8, 32768, 1_000_000, "mistral", layernorm_epsilon=1e-5),
    },
)
