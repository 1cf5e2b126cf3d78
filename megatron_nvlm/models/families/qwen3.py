"""Qwen3: RMSNorm of each head of queries and keys, no biases, and a head size apart from the hidden size."""

from megatron_nvlm.models.families.language_family import LanguageFamily, LanguagePreset

QWEN3 = LanguageFamily(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    query_key_norm=True,
    default_head_size=128,
    window_key="use_sliding_window",
    presets={
        # config.json of Qwen/Qwen3-8B; not a model of the paper
        "qwen3_8b": LanguagePreset(36, 4096, 12288, 32, 8, 151936, 1_000_000, "qwen3", kv_channels=128),
        # config.json of Qwen/Qwen3-0.6B; not a model of the paper
        "qwen3_0.6b": LanguagePreset(
            28, 1024, 3072, 16, 8, 151936, 1_000_000, "qwen3", tied_embeddings=True, kv_channels=128
        ),
        # ours, for trials on a laptop: tied embeddings as in the small models, heads of 48, not 128 / 4
        "tiny_qwen3": LanguagePreset(4, 128, 352, 4, 2, 1152, 10_000, "qwen3", tied_embeddings=True, kv_channels=48),
    },
)
