"""The tables: language models, InternViT, the NVLM-D release, and our folders of NVLM-X and NVLM-H."""

from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.families.languages import family_of
from megatron_nvlm.models.families.vision_family import VisionPreset
from megatron_nvlm.models.families.visions import vision_family_of
from megatron_nvlm.models.weight_rows import (
    ByGroup,
    Direct,
    GateAndUp,
    Row,
    expand,
)
from megatron_nvlm.sequence.variants import Variant

RELEASE_PADDING_HEADS = 7
"""Heads of zeros that the NVLM-D release's code has after the real ones of an RMSNorm encoder, whatever their number."""

_LAYER = "language_model.decoder.layers.*"


def language_rows(preset: LanguagePreset, theirs: str = "") -> list[Row]:
    """A language model of any family, below the prefix `theirs` of the folder's names."""
    family = family_of(preset)
    layer = f"{theirs}model.layers.*"
    groups = preset.num_query_groups
    grouped = ByGroup(groups, (preset.num_attention_heads // groups, 1, 1))

    def qkv(kind: str) -> tuple[str, ...]:
        return tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")

    rows = [
        Row("language_model.embedding.word_embeddings.weight", (f"{theirs}model.embed_tokens.weight",), Direct()),
        Row(f"{_LAYER}.input_layernorm.weight", (f"{layer}.input_layernorm.weight",), Direct()),
        Row(f"{_LAYER}.self_attention.linear_qkv.weight", qkv("weight"), grouped),
        Row(f"{_LAYER}.self_attention.linear_proj.weight", (f"{layer}.self_attn.o_proj.weight",), Direct()),
        Row(f"{_LAYER}.pre_mlp_layernorm.weight", (f"{layer}.post_attention_layernorm.weight",), Direct()),
        Row(
            f"{_LAYER}.mlp.linear_fc1.weight",
            (f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"),
            GateAndUp(),
        ),
        Row(f"{_LAYER}.mlp.linear_fc2.weight", (f"{layer}.mlp.down_proj.weight",), Direct()),
        Row("language_model.decoder.final_layernorm.weight", (f"{theirs}model.norm.weight",), Direct()),
    ]
    if family.qkv_bias:
        rows.append(Row(f"{_LAYER}.self_attention.linear_qkv.bias", qkv("bias"), grouped))
    if family.query_key_norm:
        for part in "qk":
            name = f"{_LAYER}.self_attention.{part}_layernorm.weight"
            rows.append(Row(name, (f"{layer}.self_attn.{part}_norm.weight",), Direct()))
    if not preset.tied_embeddings:
        rows.append(Row("language_model.output_layer.weight", (f"{theirs}lm_head.weight",), Direct()))
    return expand(rows, range(preset.num_layers))


def vision_rows(preset: VisionPreset, theirs: str = "", padding_heads: int = 0) -> list[Row]:
    """A vision model of any family, below the prefix `theirs` of the folder's names.

    Args:
        padding_heads: heads of zeros that their tensors have after the real ones; any number is read, this one is written.
    """
    return vision_family_of(preset).rows(preset, theirs, padding_heads)


# Projector -> its rows. NVLM-X has one linear layer, the others what the release has.
PROJECTOR_ROWS: dict[str, list[Row]] = {
    "mlp": [
        Row("vision_projection.layernorm.weight", ("mlp1.0.weight",), Direct()),
        Row("vision_projection.layernorm.bias", ("mlp1.0.bias",), Direct()),
        Row("vision_projection.mlp.linear_fc1.weight", ("mlp1.1.weight",), Direct()),
        Row("vision_projection.mlp.linear_fc2.weight", ("mlp1.3.weight",), Direct()),
    ],
    "linear": [Row("vision_projection.linear.weight", ("mlp1.weight",), Direct())],
}


def cross_attention_rows(preset: LanguagePreset, cross_attention: CrossAttentionConfig, theirs: str = "") -> list[Row]:
    """Gated cross-attention, below the prefix `theirs`; names in the folder are ours (nobody published any)."""
    layer = f"{theirs}model.layers.*"
    attention, there = f"{_LAYER}.cross_attention", f"{layer}.cross_attn"
    groups = cross_attention.num_query_groups or preset.num_query_groups
    rows = [
        Row(f"{_LAYER}.pre_cross_attn_layernorm.weight", (f"{layer}.pre_cross_attn_layernorm.weight",), Direct()),
        Row(f"{attention}.linear_q.weight", (f"{there}.q_proj.weight",), Direct()),
        Row(
            f"{attention}.linear_kv.weight",
            (f"{there}.k_proj.weight", f"{there}.v_proj.weight"),
            ByGroup(groups, (1, 1)),
        ),
        Row(f"{attention}.linear_proj.weight", (f"{there}.o_proj.weight",), Direct()),
        Row(f"{_LAYER}.cross_attn_bda.gate", (f"{there}.gate",), Direct()),
    ]
    if cross_attention.qk_norm:
        for part in "qk":
            rows.append(Row(f"{attention}.{part}_layernorm.weight", (f"{there}.{part}_norm.weight",), Direct()))
    return expand(rows, sorted(cross_attention.layers(preset.num_layers)))


def nvlm_rows(
    variant: Variant,
    language: LanguagePreset,
    vision: VisionPreset,
    cross_attention: CrossAttentionConfig,
    padding_heads: int | None = None,
) -> list[Row]:
    """A whole folder: NVLM-D by the names and shapes of the public release, NVLM-X and NVLM-H by ours beside them.

    Args:
        padding_heads: heads of zeros that the folder stores; None for the release's number (NVLM-D with an encoder of the
            6B family), and none in ours.
    """
    if padding_heads is None:
        padding_heads = default_padding_heads(variant, vision)
    rows = [
        *vision_rows(vision, "vision_model.", padding_heads),
        *PROJECTOR_ROWS[variant.projector],
        *language_rows(language, "language_model."),
    ]
    if variant.needs_cross_attention:
        rows += cross_attention_rows(language, cross_attention, "language_model.")
    return rows


def default_padding_heads(variant: Variant, vision: VisionPreset) -> int:
    """Heads of zeros in a folder that does not say: the release's code has them in its RMSNorm encoder."""
    return RELEASE_PADDING_HEADS if variant.name == "d" and vision.qk_norm else 0
