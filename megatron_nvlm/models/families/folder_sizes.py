"""Sizes of a model from the config.json of its Hugging Face folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.families.sizes import VisionPreset

CONFIG_FILE = "config.json"
NORMS = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; UserError if it has none."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no Hugging Face folder: its config.json cannot be read ({error}); name a folder with config.json "
            "and safetensors files"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no description of a model")
    return config


def vision_preset_of(folder: Path) -> VisionPreset:
    """Sizes of the InternViT in a folder: its own, or the one within NVLM or InternVL."""
    config = read_config(folder)
    inner = config.get("vision_config", config)
    where = str(folder / CONFIG_FILE)
    norm = inner.get("norm_type", "rms_norm")
    if not str(inner.get("model_type", "")).startswith("intern_vit") or norm not in NORMS:
        raise UserError(
            f"{where}: the vision model is of {inner.get('model_type')!r} with norms {norm!r}; use an InternViT "
            "(model_type intern_vit_6b, norm_type rms_norm or layer_norm)"
        )
    qk_norm = bool(inner.get("qk_normalization"))
    if qk_norm and norm != "rms_norm":
        raise UserError(f"{where}: query and key norms stand in InternViT with norm_type rms_norm only, not {norm!r}")
    return VisionPreset(
        num_layers=number_of(inner, "num_hidden_layers", where),
        hidden_size=number_of(inner, "hidden_size", where),
        ffn_hidden_size=number_of(inner, "intermediate_size", where),
        num_attention_heads=number_of(inner, "num_attention_heads", where),
        normalization=NORMS[norm],
        qk_norm=qk_norm,
        qkv_bias=bool(inner.get("qkv_bias", False)),
        # The 6B release was trained at 448 pixels and its positions are stored for the size that the config names.
        tile_size=int(config.get("force_image_size") or inner.get("image_size") or 448),
        patch_size=int(inner.get("patch_size", 14)),
        layernorm_epsilon=float(inner.get("layer_norm_eps", 1e-6)),
        layer_scale_init=float(inner.get("initializer_factor", 0.1)),
    )


def number_of(config: Mapping[str, Any], key: str, where: str) -> int:
    """A whole number of a config.json; UserError if it is none."""
    value = config.get(key)
    if not isinstance(value, int):
        raise UserError(f"{where}: {key} is {value!r}, not a number; is this the config.json of the model?")
    return value
