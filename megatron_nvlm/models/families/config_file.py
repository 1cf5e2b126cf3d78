"""The config.json of a Hugging Face folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.families.config_keys import is_count, shorten
from megatron_nvlm.regular_files import check_regular

CONFIG_FILE = "config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; UserError if it has none."""
    path = folder / CONFIG_FILE
    check_regular(path)
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


def number_of(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A whole number of a config.json; UserError if it is none, or absent without a default."""
    value = default if config.get(key) is None else config[key]
    if not is_count(value):
        raise UserError(
            f"{where}: {key} is {shorten(value)}, not a whole number from 1; is this the config.json of the model?"
        )
    return int(value)  # type: ignore[arg-type]


def section_of(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The keys of a part of a whole folder's model, or of the folder's only model; UserError if they are no object."""
    section = config.get(key, config)
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: {key} is {shorten(section)}; it must be an object")
    return section
