"""Sizes of a model from the config.json of its Hugging Face folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.families.sizes import LanguagePreset, VisionPreset

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


def language_preset_of(folder: Path) -> LanguagePreset:
    """Sizes of the language model in a folder: its own, or the one within NVLM or InternVL."""
    config = read_config(folder)
    inner = config.get("llm_config", config)
    where = str(folder / CONFIG_FILE)
    _refuse_language(inner, where)
    architecture = (inner.get("architectures") or [""])[0]
    heads = _number(inner, "num_attention_heads", where)
    return LanguagePreset(
        num_layers=_number(inner, "num_hidden_layers", where),
        hidden_size=_number(inner, "hidden_size", where),
        ffn_hidden_size=_number(inner, "intermediate_size", where),
        num_attention_heads=heads,
        num_query_groups=int(inner.get("num_key_value_heads") or heads),
        vocab_size=_number(inner, "vocab_size", where),
        rotary_base=int(_rope(inner).get("rope_theta", inner.get("rope_theta", 10_000))),
        qkv_bias=architecture.startswith("Qwen2"),
        tied_embeddings=bool(inner.get("tie_word_embeddings", False)),
        layernorm_epsilon=float(inner.get("rms_norm_eps", 1e-6)),
    )


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What newer versions of transformers collect in one place."""
    found = config.get("rope_parameters")
    return found if isinstance(found, dict) else {}


def _refuse_language(config: Mapping[str, Any], where: str) -> None:
    """What our decoder does not compute, or what no test of layouts covers."""
    architecture = (config.get("architectures") or [""])[0]
    is_qwen = architecture.startswith("Qwen2")
    scaling = config.get("rope_scaling") or {}
    kind = _rope(config).get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    head = config.get("head_dim")
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    for is_so, what in (
        (
            not architecture.startswith(("Qwen2ForCausalLM", "LlamaForCausalLM")),
            f"is of {architecture or 'no architecture'}",
        ),
        (config.get("hidden_act", "silu") != "silu", f"has the activation {config.get('hidden_act')}"),
        # The release names a scaling that Qwen2's code never read.
        (kind != "default" and not is_qwen, f"scales its rotary embedding ({kind})"),
        (bool(config.get("use_sliding_window")), "has a sliding window"),
        (bool(config.get("attention_bias")) and not is_qwen, "has biases in all of its attention"),
        (bool(config.get("mlp_bias")), "has biases in its MLP"),
        (bool(head and width and heads and head * heads != width), f"has heads of {head}, not hidden_size / heads"),
        (bool(config.get("tie_word_embeddings")), "ties its embeddings, which no test of layouts covers"),
    ):
        if is_so:
            raise UserError(
                f"{where}: the language model {what}, which is not supported; use a Qwen2ForCausalLM or LlamaForCausalLM "
                "with plain rotary embedding and an output layer of its own"
            )


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
        num_layers=_number(inner, "num_hidden_layers", where),
        hidden_size=_number(inner, "hidden_size", where),
        ffn_hidden_size=_number(inner, "intermediate_size", where),
        num_attention_heads=_number(inner, "num_attention_heads", where),
        normalization=NORMS[norm],
        qk_norm=qk_norm,
        qkv_bias=bool(inner.get("qkv_bias", False)),
        # The 6B release was trained at 448 pixels and its positions are stored for the size that the config names.
        tile_size=int(config.get("force_image_size") or inner.get("image_size") or 448),
        patch_size=int(inner.get("patch_size", 14)),
        layernorm_epsilon=float(inner.get("layer_norm_eps", 1e-6)),
        layer_scale_init=float(inner.get("initializer_factor", 0.1)),
    )


def _number(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise UserError(f"{where}: {key} is {value!r}, not a number; is this the config.json of the model?")
    return value
