"""What a tokenizer.json stores beside its vocabulary changes no ids, and text that cannot be encoded is named."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.errors import UserError
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer

TEXT = "Once upon a time there lived a cat, a dog, a bird and a fish in a house on a hill by the sea. " * 3
STORED: dict[str, dict[str, Any]] = {
    "truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 400},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    },
    "dropout": {},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    qwen2_tokenizer(1024).save(str(path))
    return path


def storing(plain: Path, folder: Path, name: str) -> Path:
    """The same tokenizer, with a setting that other libraries store."""
    content = json.loads(plain.read_text())
    if name == "dropout":
        content["model"]["dropout"] = 0.5
    else:
        content[name] = STORED[name]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", STORED)
def test_stored_settings_change_no_ids(plain: Path, tmp_path: Path, name: str) -> None:
    expected = Tokenizer.load(plain)
    path = storing(plain, tmp_path, name)
    loaded = Tokenizer.load(path)
    for tokenizer in (loaded, pickle.loads(pickle.dumps(loaded))):
        assert tokenizer.encode(TEXT) == expected.encode(TEXT) and tokenizer.encode("cat") == expected.encode("cat")
        assert tokenizer.encode_joined(TEXT, TEXT) == expected.encode_joined(TEXT, TEXT)
        assert tokenizer.fingerprint == expected.fingerprint


@pytest.mark.parametrize("text", ["a \ud83d b", TEXT + "\udc00"])
def test_a_lone_surrogate_is_named(plain: Path, text: str) -> None:
    tokenizer = Tokenizer.load(plain)
    place = next(place for place, letter in enumerate(text) if letter in "\ud83d\udc00")
    says = f"lone surrogate U\\+{ord(text[place]):04X} at character {place},"
    with pytest.raises(UserError, match=says):
        tokenizer.encode(text)
    with pytest.raises(UserError, match=says):
        tokenizer.encode_joined(text, "more")
