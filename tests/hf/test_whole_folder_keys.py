"""Keys of a whole folder's config.json: what means another computation is refused by name, the rest is read."""

from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.config_json import check_whole_folder, most_tiles_of
from megatron_nvlm.models.families.language_json import read_language
from megatron_nvlm.models.families.visions import read_vision
from tests.hf.folders import VARIANT_NAMES, config_of
from tests.support.tiny import tiny_config

FOLDER = Path("folder")
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "features of an inner layer": ({"select_layer": -2}, "select_layer is -2; it must be -1 or 3"),
    "another order of channels": ({"ps_version": "v1"}, "ps_version is 'v1'; it must be v2"),
    "the order by default": ({"ps_version": None}, "ps_version is 'v1'"),
    "other blocks": ({"downsample_ratio": 0.25}, "downsample_ratio is 0.25; it must be 0.5"),
    "no thumbnail": ({"use_thumbnail": False}, "use_thumbnail is False; it must be true"),
    "more tiles at least": ({"min_dynamic_patch": 2}, "min_dynamic_patch is 2; it must be 1"),
    "an adapter": ({"use_llm_lora": 16}, "merge the adapter"),
    "an unknown key": ({"vision_scale": 2.0, "a_gate": 1}, "a_gate, vision_scale is not known here"),
}


def changed(**keys: Any) -> dict[str, Any]:
    config = {**config_of(tiny_config("h")), **keys}
    return {key: value for key, value in config.items() if value is not None}


@pytest.mark.parametrize("name", WRONG)
def test_what_means_another_computation_is_refused(name: str) -> None:
    keys, words = WRONG[name]
    with pytest.raises(UserError, match=words) as caught:
        check_whole_folder(changed(**keys), FOLDER)
    assert "folder/config.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_every_key_of_our_own_folders_is_known(variant: str) -> None:
    config = config_of(tiny_config(variant))
    check_whole_folder(config, FOLDER)
    read_language(config["llm_config"], "config.json")
    read_vision(config, "config.json")


def test_the_last_layer_has_two_names_and_notes_change_nothing() -> None:
    check_whole_folder(changed(select_layer=3), FOLDER)
    check_whole_folder(changed(transformers_version="4.57.0", use_llm_lora=0, unknown=None), FOLDER)


def test_images_of_one_tile() -> None:
    assert most_tiles_of(changed()) == 6
    assert most_tiles_of(changed(max_dynamic_patch=12)) == 12
    assert most_tiles_of(changed(dynamic_image_size=False)) == 1


@pytest.mark.parametrize(
    ("section", "keys", "words"),
    [
        ("llm_config", {"layer_types": 5}, "layer_types is 5; it must be full_attention in every layer"),
        ("llm_config", {"use_mrope": True}, "use_mrope is True; it must be false"),
        ("llm_config", {"final_logit_softcapping": 30.0}, "the language model: final_logit_softcapping is not known"),
        ("vision_config", {"num_channels": 4}, "num_channels is 4; it must be 3"),
        ("vision_config", {"rotary": True}, "the vision model: rotary is not known"),
        ("vision_config", {"hidden_act": "quick_gelu"}, "activation 'quick_gelu'"),
    ],
)
def test_keys_of_the_parts(section: str, keys: dict[str, Any], words: str) -> None:
    config = changed()
    config[section] = {**config[section], **keys}
    with pytest.raises(UserError, match=words):
        read_language(config["llm_config"], "config.json")
        read_vision(config, "config.json")
