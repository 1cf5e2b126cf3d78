"""The command convert_checkpoint in this process, and two small folders for it."""

from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.commands import convert_checkpoint
from megatron_nvlm.parallel.device import Device
from tests.support.folders import language_folder, vision_folder


def convert(*arguments: object) -> int:
    """The command in this process; its status."""
    with pytest.raises(SystemExit) as ended:
        convert_checkpoint.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(autouse=True)
def keep_groups(monkeypatch: pytest.MonkeyPatch, world_of_one: Device) -> None:
    """Groups belong to the session here, and to the process when the command runs alone."""
    monkeypatch.setattr(convert_checkpoint, "stop_groups", lambda: None)


def small_vision(folder: Path, is_6b: bool, heads: int = 2, layers: int = 1) -> Any:
    sizes = {"hidden_size": 8 * heads, "intermediate_size": 20, "image_size": (28, 28), "patch_size": (14, 14)}
    return vision_folder(folder, is_6b, num_attention_heads=heads, num_hidden_layers=layers, **sizes)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[object, ...]:
    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    language_folder(tmp_path / "language", "qwen2", vocab_size=40, **sizes)
    small_vision(tmp_path / "vision", is_6b=True)
    return ("--language-model", tmp_path / "language", "--vision-model", tmp_path / "vision")
