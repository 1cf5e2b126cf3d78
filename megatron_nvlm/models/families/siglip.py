"""SigLIP: no class token, no layer-scales, a norm after the last layer. A second encoder; not of the paper.

Features are taken after that norm, as transformers' SiglipVisionModel gives them (our choice).
"""

from collections.abc import Mapping
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import HALVES
from megatron_nvlm.models.families.config_file import number_of
from megatron_nvlm.models.families.vision_family import VisionFamily, VisionPreset
from megatron_nvlm.models.weight_rows import ByGroup, Direct, Row, expand

_ACTIVATION = "gelu_pytorch_tanh"


def _read(config: Mapping[str, Any], inner: Mapping[str, Any], where: str) -> VisionPreset:
    activation = inner.get("hidden_act") or _ACTIVATION
    if activation != _ACTIVATION:
        raise UserError(f"{where}: the vision model has the activation {activation!r}, and SigLIP has {_ACTIVATION}")
    return VisionPreset(
        num_layers=number_of(inner, "num_hidden_layers", where),
        hidden_size=number_of(inner, "hidden_size", where),
        ffn_hidden_size=number_of(inner, "intermediate_size", where),
        num_attention_heads=number_of(inner, "num_attention_heads", where),
        normalization="LayerNorm",
        qk_norm=False,
        qkv_bias=True,
        tile_size=number_of(inner, "image_size", where),
        patch_size=number_of(inner, "patch_size", where),
        layernorm_epsilon=float(inner.get("layer_norm_eps") or 1e-6),
        family="siglip",
    )


def _describe(preset: VisionPreset) -> dict[str, Any]:
    return {
        "architectures": ["SiglipVisionModel"],
        "hidden_act": _ACTIVATION,
        "model_type": "siglip_vision_model",
        "norm_type": "layer_norm",
        "vision_use_head": False,
    }


def _rows(preset: VisionPreset, theirs: str, padding_heads: int) -> list[Row]:
    if padding_heads:
        raise UserError("folders of SigLIP have no padding heads; remove num_dummy_heads from vision_config")
    ours, layer = "vision_model.decoder.layers.*", f"{theirs}encoder.layers.*"
    heads = ByGroup(preset.num_attention_heads, (1, 1, 1))
    rows = [
        Row("vision_model.position_embeddings.weight", (f"{theirs}embeddings.position_embedding.weight",), Direct())
    ]
    for kind in ("weight", "bias"):
        queries, keys, values = (f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
        rows.append(Row(f"{ours}.self_attention.linear_qkv.{kind}", (queries, keys, values), heads))
        for name, there in (
            ("vision_model.conv1", f"{theirs}embeddings.patch_embedding"),
            (f"{ours}.input_layernorm", f"{layer}.layer_norm1"),
            (f"{ours}.self_attention.linear_proj", f"{layer}.self_attn.out_proj"),
            (f"{ours}.pre_mlp_layernorm", f"{layer}.layer_norm2"),
            (f"{ours}.mlp.linear_fc1", f"{layer}.mlp.fc1"),
            (f"{ours}.mlp.linear_fc2", f"{layer}.mlp.fc2"),
            ("vision_model.decoder.final_layernorm", f"{theirs}post_layernorm"),
        ):
            rows.append(Row(f"{name}.{kind}", (f"{there}.{kind}",), Direct()))
    return expand(rows, range(preset.num_layers))


SIGLIP = VisionFamily(
    name="siglip",
    model_type="siglip",
    read=_read,
    describe=_describe,
    rows=_rows,
    has_class_token=False,
    has_layer_scale=False,
    has_final_norm=True,
    activation=_ACTIVATION,
    pixels=HALVES,
    exported_class="siglip_nvlm.SiglipModel",
    own_prefix="vision_model.",
    unused_names=("head.", "vision_model.head.", "text_model.", "logit_scale", "logit_bias"),
    presets={
        # config.json of google/siglip-so400m-patch14-384; not a model of the paper
        "siglip_so400m": VisionPreset(
            27, 1152, 4304, 16, "LayerNorm", qk_norm=False, qkv_bias=True, tile_size=384, family="siglip"
        ),
        # ours, for trials on a laptop: an odd grid of 5 x 5 patches
        "tiny_siglip": VisionPreset(
            3, 96, 256, 4, "LayerNorm", qk_norm=False, qkv_bias=True, tile_size=70, family="siglip"
        ),
    },
)
