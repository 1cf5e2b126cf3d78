"""InternViT, the encoder of the paper, in both sizes of the public releases.

6B has RMSNorm, RMSNorm over the full width of queries and keys, and no biases of these; 300M has LayerNorm and biases.
"""

from collections.abc import Mapping
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import IMAGENET
from megatron_nvlm.models.families.config_file import number_of
from megatron_nvlm.models.families.vision_family import VisionFamily, VisionPreset
from megatron_nvlm.models.weight_rows import Direct, DropFirstAxis, InterleaveHeads, RealWidth, Row, expand

NORMS = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}


def _read(config: Mapping[str, Any], inner: Mapping[str, Any], where: str) -> VisionPreset:
    norm = inner.get("norm_type") or "rms_norm"
    if norm not in NORMS:
        raise UserError(
            f"{where}: the vision model is of {inner.get('model_type')!r} with norms {norm!r}; use an InternViT "
            "(model_type intern_vit_6b, norm_type rms_norm or layer_norm)"
        )
    qk_norm = inner.get("qk_normalization") is not False  # what is absent is as in the class of the release
    if qk_norm and norm != "rms_norm":
        raise UserError(f"{where}: query and key norms stand in InternViT with norm_type rms_norm only, not {norm!r}")
    if (inner.get("hidden_act") or "gelu") != "gelu":
        raise UserError(f"{where}: the vision model has the activation {inner['hidden_act']!r}, and InternViT has gelu")
    return VisionPreset(
        num_layers=number_of(inner, "num_hidden_layers", where),
        hidden_size=number_of(inner, "hidden_size", where),
        ffn_hidden_size=number_of(inner, "intermediate_size", where),
        num_attention_heads=number_of(inner, "num_attention_heads", where),
        normalization=NORMS[norm],
        qk_norm=qk_norm,
        qkv_bias=bool(inner.get("qkv_bias")),
        # The 6B release was trained at 448 pixels and its positions are stored for the size that the config names.
        tile_size=number_of(config, "force_image_size", where, number_of(inner, "image_size", where, 224)),
        patch_size=number_of(inner, "patch_size", where, 14),
        layernorm_epsilon=float(inner.get("layer_norm_eps") or 1e-6),
        layer_scale_init=float(inner.get("initializer_factor") or 0.1),
    )


def _describe(preset: VisionPreset) -> dict[str, Any]:
    return {
        "architectures": ["InternVisionModel"],
        "hidden_act": "gelu",
        "initializer_factor": preset.layer_scale_init,
        "model_type": "intern_vit_6b",
        "norm_type": next(name for name, norm in NORMS.items() if norm == preset.normalization),
        "qk_normalization": preset.qk_norm,
        "qkv_bias": preset.qkv_bias,
        "use_flash_attn": True,
    }


def _rows(preset: VisionPreset, theirs: str, padding_heads: int) -> list[Row]:
    ours = "vision_model.decoder.layers.*"
    layer = f"{theirs}encoder.layers.*"
    width = preset.hidden_size
    head = width // preset.num_attention_heads
    stored = preset.num_attention_heads + padding_heads
    heads = InterleaveHeads(preset.num_attention_heads, head, stored)
    rows = [
        Row("vision_model.class_token", (f"{theirs}embeddings.class_embedding",), Direct()),
        Row("vision_model.position_embeddings.weight", (f"{theirs}embeddings.position_embedding",), DropFirstAxis()),
        *(
            Row(f"vision_model.conv1.{kind}", (f"{theirs}embeddings.patch_embedding.{kind}",), Direct())
            for kind in ("weight", "bias")
        ),
        Row(f"{ours}.self_attn_bda.scale", (f"{layer}.ls1",), Direct()),
        Row(f"{ours}.mlp_bda.scale", (f"{layer}.ls2",), Direct()),
        Row(f"{ours}.self_attention.linear_qkv.weight", (f"{layer}.attn.qkv.weight",), heads),
        Row(
            f"{ours}.self_attention.linear_proj.weight",
            (f"{layer}.attn.proj.weight",),
            RealWidth(width, 1, stored * head),
        ),
        Row(f"{ours}.self_attention.linear_proj.bias", (f"{layer}.attn.proj.bias",), Direct()),
        *(
            Row(f"{ours}.mlp.linear_{fc}.{kind}", (f"{layer}.mlp.{fc}.{kind}",), Direct())
            for fc in ("fc1", "fc2")
            for kind in ("weight", "bias")
        ),
    ]
    norm_parts = ("weight",) if preset.normalization == "RMSNorm" else ("weight", "bias")
    for kind in norm_parts:
        rows.append(Row(f"{ours}.input_layernorm.{kind}", (f"{layer}.norm1.{kind}",), Direct()))
        rows.append(Row(f"{ours}.pre_mlp_layernorm.{kind}", (f"{layer}.norm2.{kind}",), Direct()))
    if preset.qkv_bias:
        rows.append(Row(f"{ours}.self_attention.linear_qkv.bias", (f"{layer}.attn.qkv.bias",), heads))
    if preset.qk_norm:
        for part in "qk":
            name = f"{ours}.self_attention.full_{part}_layernorm.weight"
            rows.append(Row(name, (f"{layer}.attn.{part}_norm.weight",), RealWidth(width, 0, stored * head)))
    return expand(rows, range(preset.num_layers))


INTERN_VIT = VisionFamily(
    name="intern_vit",
    model_type="intern_vit",
    read=_read,
    describe=_describe,
    rows=_rows,
    has_class_token=True,
    has_layer_scale=True,
    has_final_norm=False,
    activation="gelu",
    pixels=IMAGENET,
    exported_class="vision_nvlm.VisionModel",
    presets={
        # config.json of OpenGVLab/InternViT-6B-448px-V1-5 (paper, section 4.1)
        "internvit_6b": VisionPreset(45, 3200, 12800, 25, "RMSNorm", qk_norm=True, qkv_bias=False),
        # config.json of OpenGVLab/InternViT-300M-448px; not a model of the paper
        "internvit_300m": VisionPreset(24, 1024, 4096, 16, "LayerNorm", qk_norm=False, qkv_bias=True),
        # ours, for the demo on a laptop: the 6B family's form, tiles of 56 pixels; layer-scales at 1 to train from scratch
        "tiny": VisionPreset(
            3, 96, 256, 4, "RMSNorm", qk_norm=True, qkv_bias=False, tile_size=56, layer_scale_init=1.0
        ),
    },
)
