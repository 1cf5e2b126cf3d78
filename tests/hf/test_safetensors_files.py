"""Which files of a folder are read: those that transformers reads, which is asked as well."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.safetensors_files import INDEX_FILE, SINGLE_FILE, SafetensorsFolder
from tests.support.folders import language_folder

SIZES = dict(
    num_hidden_layers=1,
    hidden_size=16,
    intermediate_size=20,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=24,
)
EMBEDDING = "model.embed_tokens.weight"


def _embedding_of_transformers(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.get_input_embeddings().weight.detach()


def _sharded(folder: Path) -> None:
    language_folder(folder, "qwen2", seed=0, **SIZES).save_pretrained(folder, max_shard_size="4KB")
    (folder / SINGLE_FILE).unlink(missing_ok=True)
    assert (folder / INDEX_FILE).is_file()


def test_a_single_file_wins_over_an_old_index_and_its_shards(tmp_path: Path) -> None:
    _sharded(tmp_path / "model")
    newer = language_folder(tmp_path / "newer", "qwen2", seed=1, **SIZES)
    (tmp_path / "newer" / SINGLE_FILE).rename(tmp_path / "model" / SINGLE_FILE)
    found = SafetensorsFolder(tmp_path / "model").read(EMBEDDING)
    assert torch.equal(found, newer.state_dict()[EMBEDDING])
    assert torch.equal(found, _embedding_of_transformers(tmp_path / "model"))


def test_an_index_says_which_files_are_read(tmp_path: Path) -> None:
    _sharded(tmp_path / "model")
    language_folder(tmp_path / "other", "qwen2", seed=1, **SIZES)
    (tmp_path / "other" / SINGLE_FILE).rename(tmp_path / "model" / "another.safetensors")
    found = SafetensorsFolder(tmp_path / "model").read(EMBEDDING)
    assert torch.equal(found, _embedding_of_transformers(tmp_path / "model"))


def test_files_without_an_index_are_refused_as_in_transformers(tmp_path: Path) -> None:
    _sharded(tmp_path / "model")
    (tmp_path / "model" / INDEX_FILE).unlink()
    with pytest.raises(OSError, match=SINGLE_FILE):
        _embedding_of_transformers(tmp_path / "model")
    with pytest.raises(UserError, match="no model.safetensors.index.json that names it") as caught:
        SafetensorsFolder(tmp_path / "model")
    assert "\n" not in str(caught.value)
