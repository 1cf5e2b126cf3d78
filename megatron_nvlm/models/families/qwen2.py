"""Qwen2: biases of queries, keys and values. The language model of NVLM's final models."""

from megatron_nvlm.models.families.language_family import LanguageFamily, LanguagePreset

QWEN2 = LanguageFamily(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    qkv_bias=True,
    # The NVLM-D release's config.json says "dynamic", which Qwen2's code of that time never read, and which changes
    # nothing up to max_position_embeddings.
    scalings_without_effect=("dynamic",),
    # The same file says attention_bias, and its output projection has none.
    reads_attention_bias=False,
    window_key="use_sliding_window",
    presets={
        # config.json of Qwen/Qwen2-72B-Instruct; NVLM's final models (paper, section 4.1)
        "qwen2_72b": LanguagePreset(80, 8192, 29568, 64, 8, 152064, 1_000_000, "qwen2"),
        # config.json of Qwen/Qwen2-7B-Instruct; not a model of the paper
        "qwen2_7b": LanguagePreset(28, 3584, 18944, 28, 4, 152064, 1_000_000, "qwen2"),
        # config.json of Qwen/Qwen2-1.5B-Instruct; not a model of the paper
        "qwen2_1.5b": LanguagePreset(28, 1536, 8960, 12, 2, 151936, 1_000_000, "qwen2", tied_embeddings=True),
        # config.json of Qwen/Qwen2-0.5B-Instruct; not a model of the paper
        "qwen2_0.5b": LanguagePreset(24, 896, 4864, 14, 2, 151936, 1_000_000, "qwen2", tied_embeddings=True),
        # ours, for the demo on a laptop: a vocabulary cut to 1024 tokens and room for special ones
        "tiny": LanguagePreset(4, 128, 352, 4, 2, 1152, 10_000, "qwen2"),
    },
)
