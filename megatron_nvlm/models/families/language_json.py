"""A language model's config.json: what it says of the sizes, and the one that we write.

Each key is honoured, refused, or without effect on what is computed here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.families.config_file import CONFIG_FILE, number_of, read_config, section_of
from megatron_nvlm.models.families.config_keys import (
    COUNT,
    FLAG,
    NUMBER,
    SECTION,
    TEXT,
    WHOLE,
    Meaning,
    Meanings,
    check_keys,
    is_number,
)
from megatron_nvlm.models.families.language_family import LanguageFamily, LanguagePreset
from megatron_nvlm.models.families.languages import LANGUAGE_FAMILIES, family_of
from megatron_nvlm.models.families.rope_scaling import RopeScaling

_DEFAULT_ROPE_THETA = 10_000
_BASE: Meaning = (lambda base: is_number(base) and base == int(base), "a whole number over 0")
_MEANINGS: Meanings = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"), COUNT
    ),
    **dict.fromkeys(("head_dim", "max_position_embeddings", "num_key_value_heads", "sliding_window"), COUNT),
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "query_key_norm", "tie_word_embeddings", "use_sliding_window"), FLAG
    ),
    **dict.fromkeys(("partial_rotary_factor", "rms_norm_eps"), NUMBER),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), SECTION),
    "hidden_act": TEXT,
    "layer_types": (
        lambda kinds: isinstance(kinds, list) and {*map(str, kinds)} <= {"full_attention"},
        "full_attention in every layer",
    ),
    "max_window_layers": WHOLE,
    "rope_theta": _BASE,
    "use_mrope": (lambda value: value is False, "false"),
}


def language_preset_of(folder: Path) -> LanguagePreset:
    """Sizes of the language model in a folder: its own, or the one within NVLM or InternVL.

    Raises:
        UserError: there is none, or it computes something that ours does not.
    """
    config = read_config(folder)
    where = str(folder / CONFIG_FILE)
    return read_language(section_of(config, "llm_config", where), where)


def read_language(config: Mapping[str, Any], where: str) -> LanguagePreset:
    """Sizes from the keys of a language model.

    Args:
        where: the file, for messages.
    """
    family = _find_family(config, where)
    check_keys(config, _MEANINGS, f"{where}: the language model")
    _refuse(config, family, where)
    heads = number_of(config, "num_attention_heads", where)
    hidden = number_of(config, "hidden_size", where)
    head = config.get("head_dim") or family.default_head_size
    return LanguagePreset(
        num_layers=number_of(config, "num_hidden_layers", where),
        hidden_size=hidden,
        ffn_hidden_size=number_of(config, "intermediate_size", where),
        num_attention_heads=heads,
        num_query_groups=number_of(config, "num_key_value_heads", where, heads),
        vocab_size=number_of(config, "vocab_size", where),
        rotary_base=_rotary_base(config, where),
        family=family.name,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        layernorm_epsilon=float(config.get("rms_norm_eps") or 1e-6),
        # Qwen3 has a head size of its own even where it is the quotient: presets name it.
        kv_channels=head if head and (family.default_head_size or head * heads != hidden) else None,
        rope_scaling=_scaling(config, family, where),
    )


def describe_language(preset: LanguagePreset, max_sequence_length: int, dtype: str) -> dict[str, Any]:
    """The keys of a config.json of that model, as transformers reads them."""
    family = family_of(preset)
    config = {
        "architectures": [family.architecture],
        "attention_bias": family.qkv_bias,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": preset.hidden_size,
        "intermediate_size": preset.ffn_hidden_size,
        "max_position_embeddings": max_sequence_length,
        "model_type": family.model_type,
        "num_attention_heads": preset.num_attention_heads,
        "num_hidden_layers": preset.num_layers,
        "num_key_value_heads": preset.num_query_groups,
        "rms_norm_eps": preset.layernorm_epsilon,
        "rope_theta": float(preset.rotary_base),
        "tie_word_embeddings": preset.tied_embeddings,
        "torch_dtype": dtype,
        "vocab_size": preset.vocab_size,
    }
    if preset.kv_channels is not None:
        config["head_dim"] = preset.kv_channels
    if family.query_key_norm:
        config["query_key_norm"] = True  # ours, for the code of exported folders
    if preset.rope_scaling is not None:
        config["rope_scaling"] = preset.rope_scaling.settings()
    return config


def _find_family(config: Mapping[str, Any], where: str) -> LanguageFamily:
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    for family in LANGUAGE_FAMILIES.values():
        if family.architecture == architecture:
            return family
    known = ", ".join(family.architecture for family in LANGUAGE_FAMILIES.values())
    raise UserError(
        f"{where}: the language model is of {architecture[:200] or 'no architecture'}, which is not supported; use one of "
        f"{known}"
    )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling of the rotary embedding, in one place as newer versions of transformers have them."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta"), **found}


def _rotary_base(config: Mapping[str, Any], where: str) -> int:
    base = _rope(config).get("rope_theta")
    check_keys({"rope_theta": base}, {"rope_theta": _BASE}, f"{where}: the language model")
    return int(base or _DEFAULT_ROPE_THETA)


def _kind(config: Mapping[str, Any]) -> str:
    rope = _rope(config)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _scaling(config: Mapping[str, Any], family: LanguageFamily, where: str) -> RopeScaling | None:
    kind = _kind(config)
    if kind in ("default", *family.scalings_without_effect):
        return None
    try:
        scaling = RopeScaling.of(_rope(config), config.get("max_position_embeddings"))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{where}: the language model {error}; use a model with plain rotary embedding, or with one of "
            f"{', '.join(family.rope_scalings)}"
        ) from error
    return scaling


def _refuse(config: Mapping[str, Any], family: LanguageFamily, where: str) -> None:
    """What our decoder does not compute."""
    window = config.get(family.window_key) if family.window_key else config.get("sliding_window")
    if not family.window_key and window is not None:
        window = window < (config.get("max_position_embeddings") or float("inf"))
    rotary_share = _rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    for is_so, what in (
        (config.get("hidden_act", "silu") != "silu", f"has the activation {config.get('hidden_act')}"),
        (bool(window), "has a sliding window of attention"),
        (family.reads_attention_bias and bool(config.get("attention_bias")), "has biases in all of its attention"),
        (bool(config.get("mlp_bias")), "has biases in its MLP"),
        (rotary_share not in (None, 1, 1.0), f"turns a share of {rotary_share} of each head"),
    ):
        if is_so:
            raise UserError(f"{where}: the language model {what}, which is not supported; use a model without it")
