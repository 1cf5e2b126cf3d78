"""The config.json of a Hugging Face folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_nvlm.errors import UserError

CONFIG_FILE = "config.json"


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


def number_of(config: Mapping[str, Any], key: str, where: str) -> int:
    """A whole number of a config.json; UserError if it is none."""
    value = config.get(key)
    if not isinstance(value, int):
        raise UserError(f"{where}: {key} is {value!r}, not a number; is this the config.json of the model?")
    return value
