"""The config.json of an NVLM folder: what it says of the model, and the one that we write."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.models.config import ResolvedModel
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.families.config_file import CONFIG_FILE, number_of, section_of
from megatron_nvlm.models.families.config_keys import COUNT, FLAG, SECTION, TEXT, WHOLE, Meanings, check_keys, is_count
from megatron_nvlm.models.families.language_json import describe_language
from megatron_nvlm.models.families.visions import describe_vision
from megatron_nvlm.sequence.variants import VARIANTS, Variant

_CROSS_ATTENTION: Meanings = {
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), COUNT),
    "layers": (
        lambda layers: isinstance(layers, list) and all(layer == 0 or is_count(layer) for layer in layers),
        "a list of layers, from 0",
    ),
    "qk_norm": FLAG,
}
_DEFAULTS = {"ps_version": "v1", "use_thumbnail": False}
"""What the release's code takes where a key is absent, and which is not what NVLM computes."""


def _meanings(config: Mapping[str, Any], where: str) -> Meanings:
    """Keys of a whole folder."""
    depth = section_of(config, "vision_config", where).get("num_hidden_layers")
    return {
        **dict.fromkeys(("cross_attention", "llm_config", "vision_config"), SECTION),
        **dict.fromkeys(("force_image_size", "max_dynamic_patch"), COUNT),
        **dict.fromkeys(("dynamic_image_size", "tie_word_embeddings"), FLAG),
        **dict.fromkeys(("background", "tag_format", "template", "thumbnail_tag", "variant"), TEXT),
        "img_context_token_id": WHOLE,
        "downsample_ratio": (lambda ratio: ratio == 0.5, "0.5, NVLM's pixel shuffle"),
        "min_dynamic_patch": (lambda tiles: tiles is not True and tiles == 1, "1"),
        "pad2square": (lambda pads: pads is False, "false"),
        "ps_version": (lambda version: version == "v2", "v2, the order of channels that NVLM's pixel shuffle has"),
        "select_layer": (lambda layer: layer in (-1, depth), f"-1 or {depth}, since features are the last layer's"),
        "use_backbone_lora": (lambda rank: not rank, "0; merge the adapter into the weights"),
        "use_llm_lora": (lambda rank: not rank, "0; merge the adapter into the weights"),
        "use_thumbnail": (lambda has: has is True, "true, since an image of several tiles has a thumbnail"),
    }


def check_whole_folder(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a whole folder whose settings mean another computation.

    Raises:
        UserError: naming the key.
    """
    where = str(folder / CONFIG_FILE)
    check_keys({**_DEFAULTS, **config}, _meanings(config, where), where)


def most_tiles_of(config: Mapping[str, Any]) -> int:
    """Most tiles of an image: of whole folders, where images may be one tile each."""
    if is_whole_folder(config) and not config.get("dynamic_image_size", False):
        return 1
    return number_of(config, "max_dynamic_patch", CONFIG_FILE, 6)


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
    found = section_of(config, "vision_config", CONFIG_FILE).get("num_dummy_heads")
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
    where = str(folder / CONFIG_FILE)
    check_keys(found, _CROSS_ATTENTION, f"{where}: cross_attention")
    depth = number_of(section_of(config, "llm_config", where), "num_hidden_layers", where)
    layers = list(found["layers"])
    interval = layers[1] - layers[0] if len(layers) > 1 else depth
    described = CrossAttentionConfig(
        interval=interval,
        offset=layers[0],
        num_attention_heads=found.get("num_attention_heads"),
        num_query_groups=found.get("num_key_value_heads"),
        qk_norm=bool(found.get("qk_norm", False)),
    )
    if interval < 1 or layers[0] >= interval or sorted(described.layers(depth)) != layers:
        raise UserError(
            f"{folder / CONFIG_FILE}: cross-attention layers {layers} are not evenly spaced, which ours must be"
        )
    return described


def describe_folder(model: ResolvedModel, tiling: TilingConfig, template: str, dtype: str) -> dict[str, Any]:
    """The config.json of an NVLM folder: NVLM-D with the release's keys, NVLM-X and NVLM-H with ours beside them.

    What names code files and tokens is added by hf/companions.py, which writes those.

    Args:
        dtype: torch's name of the weights' type.
    """
    variant, language, vision = model.variant, model.language, model.vision
    cross_attention, max_sequence_length = model.config.cross_attention, model.config.max_sequence_length
    letter = variant.name.upper()
    config: dict[str, Any] = {
        "architectures": [f"NVLM_{letter}"],
        "model_type": f"NVLM_{letter}",
        "variant": variant.name,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": vision.tile_size,
        "llm_config": describe_language(language, max_sequence_length, dtype),
        "max_dynamic_patch": tiling.max_tiles,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "tag_format": tiling.tag_format,
        "template": template,
        "thumbnail_tag": tiling.thumbnail_tag,
        "tie_word_embeddings": language.tied_embeddings,
        "torch_dtype": dtype,
        "use_thumbnail": True,
        "vision_config": describe_vision(vision, dtype),
    }
    if tiling.background is not None:
        config["background"] = tiling.background
    if variant.needs_cross_attention:
        config["cross_attention"] = {
            "layers": sorted(cross_attention.layers(language.num_layers)),
            "num_attention_heads": cross_attention.num_attention_heads or language.num_attention_heads,
            "num_key_value_heads": cross_attention.num_query_groups or language.num_query_groups,
            "qk_norm": cross_attention.qk_norm,
        }
    return config
