"""Sizes of a model from the config.json of its Hugging Face folder, and the config.json of a folder that we write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.presets import LanguagePreset, VisionPreset
from megatron_nvlm.sequence.variants import VARIANTS, Variant

CONFIG_FILE = "config.json"
_NORMS = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}


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
    if not str(inner.get("model_type", "")).startswith("intern_vit") or norm not in _NORMS:
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
        normalization=_NORMS[norm],
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


def is_whole_folder(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of NVLM (or InternVL): a vision model and a language model in one folder."""
    return "llm_config" in config and "vision_config" in config


def variant_of(config: Mapping[str, Any], folder: Path) -> Variant:
    """Which NVLM a whole folder holds; UserError if it holds another model."""
    name = str(config.get("model_type", "")).removeprefix("NVLM_").lower()
    if name not in VARIANTS:
        raise UserError(
            f"{folder} is a folder of {config.get('model_type')!r}; NVLM folders have model_type NVLM_D, NVLM_X or NVLM_H"
        )
    return VARIANTS[name]


def padding_heads_of(config: Mapping[str, Any]) -> int | None:
    """Heads of zeros that the folder says its encoder stores; None if it does not say."""
    found = config.get("vision_config", config).get("num_dummy_heads")
    return None if found is None else int(found)


def cross_attention_of(config: Mapping[str, Any], folder: Path) -> CrossAttentionConfig:
    """Where a whole folder has cross-attention (NVLM-D: nowhere); UserError unless its layers are evenly spaced."""
    if not variant_of(config, folder).needs_cross_attention:
        return CrossAttentionConfig()
    found = config.get("cross_attention")
    if not isinstance(found, dict) or not found.get("layers"):
        raise UserError(
            f"{folder / CONFIG_FILE} does not say where cross-attention stands; is this a folder of NVLM-X or H?"
        )
    layers = list(found["layers"])
    interval = layers[1] - layers[0] if len(layers) > 1 else config["llm_config"]["num_hidden_layers"]
    described = CrossAttentionConfig(
        interval=interval,
        offset=layers[0],
        num_attention_heads=found.get("num_attention_heads"),
        num_query_groups=found.get("num_key_value_heads"),
        qk_norm=bool(found.get("qk_norm", False)),
    )
    if sorted(described.layers(config["llm_config"]["num_hidden_layers"])) != layers:
        raise UserError(
            f"{folder / CONFIG_FILE}: cross-attention layers {layers} are not evenly spaced, which ours must be"
        )
    return described


def describe_folder(
    variant: Variant,
    language: LanguagePreset,
    vision: VisionPreset,
    cross_attention: CrossAttentionConfig,
    max_sequence_length: int,
    max_tiles: int,
    tag_format: str,
    template: str,
    dtype: str,
) -> dict[str, Any]:
    """The config.json of an NVLM folder: NVLM-D with the release's keys, NVLM-X and NVLM-H with ours beside them.

    What names code files and tokens is added by checkpoint/hf_files.py, which writes those.

    Args:
        max_sequence_length: rows of the decoder. dtype: torch's name of the weights' type.
    """
    letter = variant.name.upper()
    config: dict[str, Any] = {
        "architectures": [f"NVLM_{letter}_Model"],
        "model_type": f"NVLM_{letter}",
        "variant": variant.name,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": vision.tile_size,
        "llm_config": _describe_language(language, max_sequence_length, dtype),
        "max_dynamic_patch": max_tiles,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "tag_format": tag_format,
        "template": template,
        "tie_word_embeddings": language.tied_embeddings,
        "torch_dtype": dtype,
        "use_thumbnail": True,
        "vision_config": _describe_vision(vision, dtype),
    }
    if variant.needs_cross_attention:
        config["cross_attention"] = {
            "layers": sorted(cross_attention.layers(language.num_layers)),
            "num_attention_heads": cross_attention.num_attention_heads or language.num_attention_heads,
            "num_key_value_heads": cross_attention.num_query_groups or language.num_query_groups,
            "qk_norm": cross_attention.qk_norm,
        }
    return config


def _describe_language(preset: LanguagePreset, max_sequence_length: int, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM" if preset.qkv_bias else "LlamaForCausalLM"],
        "attention_bias": preset.qkv_bias,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": preset.hidden_size,
        "intermediate_size": preset.ffn_hidden_size,
        "max_position_embeddings": max_sequence_length,
        "model_type": "qwen2" if preset.qkv_bias else "llama",
        "num_attention_heads": preset.num_attention_heads,
        "num_hidden_layers": preset.num_layers,
        "num_key_value_heads": preset.num_query_groups,
        "rms_norm_eps": preset.layernorm_epsilon,
        "rope_theta": float(preset.rotary_base),
        "tie_word_embeddings": preset.tied_embeddings,
        "torch_dtype": dtype,
        "vocab_size": preset.vocab_size,
    }


def _describe_vision(preset: VisionPreset, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["InternVisionModel"],
        "hidden_act": "gelu",
        "hidden_size": preset.hidden_size,
        "image_size": preset.tile_size,
        "initializer_factor": preset.layer_scale_init,
        "intermediate_size": preset.ffn_hidden_size,
        "layer_norm_eps": preset.layernorm_epsilon,
        "model_type": "intern_vit_6b",
        "norm_type": next(name for name, norm in _NORMS.items() if norm == preset.normalization),
        "num_attention_heads": preset.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": preset.num_layers,
        "patch_size": preset.patch_size,
        "qk_normalization": preset.qk_norm,
        "qkv_bias": preset.qkv_bias,
        "torch_dtype": dtype,
        "use_flash_attn": True,
    }
