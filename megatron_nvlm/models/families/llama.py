"""Llama and Yi: no biases. Yi-34B is the language model of NVLM's ablations."""

from megatron_nvlm.models.families.language_family import LanguageFamily, LanguagePreset
from megatron_nvlm.models.families.rope_scaling import LLAMA3, RopeScaling

LLAMA = LanguageFamily(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    presets={
        # config.json of NousResearch/Nous-Hermes-2-Yi-34B; NVLM's ablations (paper, section 4.1)
        "yi_34b": LanguagePreset(60, 7168, 20480, 56, 8, 64000, 5_000_000, "llama", layernorm_epsilon=1e-5),
        # config.json of meta-llama/Llama-3.1-8B-Instruct; not a model of the paper
        "llama31_8b": LanguagePreset(
            32,
            4096,
            14336,
            32,
            8,
            128256,
            500_000,
            "llama",
            layernorm_epsilon=1e-5,
            rope_scaling=RopeScaling(LLAMA3, 8.0, 8192),
        ),
    },
)
