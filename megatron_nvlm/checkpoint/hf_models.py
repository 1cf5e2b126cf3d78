"""The tables of the public checkpoints: Qwen2 and Llama/Yi language models, InternViT, and the NVLM-D release."""

from megatron_nvlm.checkpoint.weight_map import (
    Row,
    direct,
    drop_first_axis,
    expand,
    gate_and_up,
    group_qkv,
    interleave_heads,
    real_width,
)
from megatron_nvlm.models.presets import LanguagePreset, VisionPreset


def language_rows(preset: LanguagePreset, theirs: str = "") -> list[Row]:
    """Qwen2 (with QKV bias) and Llama/Yi (without), below the prefix `theirs` of the folder's names."""
    ours = "language_model.decoder.layers.*"
    layer = f"{theirs}model.layers.*"
    grouped = group_qkv(preset.num_query_groups)

    def qkv(kind: str) -> tuple[str, ...]:
        return tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")

    rows = [
        Row("language_model.embedding.word_embeddings.weight", (f"{theirs}model.embed_tokens.weight",), direct),
        Row(f"{ours}.input_layernorm.weight", (f"{layer}.input_layernorm.weight",), direct),
        Row(f"{ours}.self_attention.linear_qkv.weight", qkv("weight"), grouped),
        Row(f"{ours}.self_attention.linear_proj.weight", (f"{layer}.self_attn.o_proj.weight",), direct),
        Row(f"{ours}.pre_mlp_layernorm.weight", (f"{layer}.post_attention_layernorm.weight",), direct),
        Row(
            f"{ours}.mlp.linear_fc1.weight",
            (f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"),
            gate_and_up,
        ),
        Row(f"{ours}.mlp.linear_fc2.weight", (f"{layer}.mlp.down_proj.weight",), direct),
        Row("language_model.decoder.final_layernorm.weight", (f"{theirs}model.norm.weight",), direct),
    ]
    if preset.qkv_bias:
        rows.append(Row(f"{ours}.self_attention.linear_qkv.bias", qkv("bias"), grouped))
    if not preset.tied_embeddings:
        rows.append(Row("language_model.output_layer.weight", (f"{theirs}lm_head.weight",), direct))
    return expand(rows, preset.num_layers)


def vision_rows(preset: VisionPreset, theirs: str = "") -> list[Row]:
    """InternViT of either family, stored with or without padding heads."""
    ours = "vision_model.decoder.layers.*"
    layer = f"{theirs}encoder.layers.*"
    heads = interleave_heads(preset.num_attention_heads, preset.hidden_size // preset.num_attention_heads)
    width = preset.hidden_size
    rows = [
        Row("vision_model.class_token", (f"{theirs}embeddings.class_embedding",), direct),
        Row("vision_model.position_embeddings.weight", (f"{theirs}embeddings.position_embedding",), drop_first_axis),
        *(
            Row(f"vision_model.conv1.{kind}", (f"{theirs}embeddings.patch_embedding.{kind}",), direct)
            for kind in ("weight", "bias")
        ),
        Row(f"{ours}.self_attn_bda.scale", (f"{layer}.ls1",), direct),
        Row(f"{ours}.mlp_bda.scale", (f"{layer}.ls2",), direct),
        Row(f"{ours}.self_attention.linear_qkv.weight", (f"{layer}.attn.qkv.weight",), heads),
        Row(f"{ours}.self_attention.linear_proj.weight", (f"{layer}.attn.proj.weight",), real_width(width, 1)),
        Row(f"{ours}.self_attention.linear_proj.bias", (f"{layer}.attn.proj.bias",), direct),
        *(
            Row(f"{ours}.mlp.linear_{fc}.{kind}", (f"{layer}.mlp.{fc}.{kind}",), direct)
            for fc in ("fc1", "fc2")
            for kind in ("weight", "bias")
        ),
    ]
    norm_parts = ("weight",) if preset.normalization == "RMSNorm" else ("weight", "bias")
    for kind in norm_parts:
        rows.append(Row(f"{ours}.input_layernorm.{kind}", (f"{layer}.norm1.{kind}",), direct))
        rows.append(Row(f"{ours}.pre_mlp_layernorm.{kind}", (f"{layer}.norm2.{kind}",), direct))
    if preset.qkv_bias:
        rows.append(Row(f"{ours}.self_attention.linear_qkv.bias", (f"{layer}.attn.qkv.bias",), heads))
    if preset.qk_norm:
        for part in "qk":
            name = f"{ours}.self_attention.full_{part}_layernorm.weight"
            rows.append(Row(name, (f"{layer}.attn.{part}_norm.weight",), real_width(width, 0)))
    return expand(rows, preset.num_layers)


def nvlm_d_rows(language: LanguagePreset, vision: VisionPreset) -> list[Row]:
    """A whole NVLM-D folder, by the names of the public release."""
    return [
        *vision_rows(vision, "vision_model."),
        Row("vision_projection.layernorm.weight", ("mlp1.0.weight",), direct),
        Row("vision_projection.layernorm.bias", ("mlp1.0.bias",), direct),
        Row("vision_projection.mlp.linear_fc1.weight", ("mlp1.1.weight",), direct),
        Row("vision_projection.mlp.linear_fc2.weight", ("mlp1.3.weight",), direct),
        *language_rows(language, "language_model."),
    ]
