"""Training that starts from Hugging Face folders: under every layout the same weights, read or new, and the same losses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_nvlm.hf.load_weights import load_folder_weights
from megatron_nvlm.hf.safetensors_files import SafetensorsFolder
from megatron_nvlm.models.config import ModelConfig, resolve_model
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.initialise import named_parameters, split_of
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.models.sharding import Split, cut
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import get_groups, start_groups
from megatron_nvlm.runs.components import make_chunks, open_weights
from tests.support.folders import language_folder, vision_folder
from tests.support.launch import launch
from tests.support.ranks import run_ranks
from tests.support.shards import read_metrics, write_run

SIZES = dict(
    vocab_size=1151,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
"""A vocabulary that two ranks do not divide."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("parts")
    language_folder(folder / "language", "qwen2", **SIZES)
    vision_folder(
        folder / "vision",
        is_6b=True,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=(56, 56),
        patch_size=(14, 14),
    )
    language, vision = str(folder / "language"), str(folder / "vision")
    cross = CrossAttentionConfig(interval=2)
    return ModelConfig("h", language, vision, cross_attention=cross, language_weights=language, vision_weights=vision)


def weights_on_rank(
    model: ModelConfig, parallelism: ParallelismConfig
) -> tuple[int, int, dict[str, tuple[Split | None, Tensor]]]:
    device = use_device()
    start_groups(parallelism, device, seed=1)
    chunks = make_chunks(resolve_model(model), parallelism, PRECISIONS["fp32"], device.torch_device, seed=5)
    weights = open_weights(resolve_model(model))
    assert weights is not None
    load_folder_weights(chunks, weights)
    group = get_groups().tp
    named = {name: (split_of(name, chunks), parameter.detach()) for name, parameter in named_parameters(chunks)}
    return group.rank(), group.size(), named


LAYOUTS = {
    "TP2": ParallelismConfig(tensor_model_parallel_size=2),
    "PP2": ParallelismConfig(pipeline_model_parallel_size=2),
    "PP2 virtual": ParallelismConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "TP2, encoder tensor parallel": ParallelismConfig(tensor_model_parallel_size=2, vision_placement="tensor_parallel"),
}


@pytest.mark.distributed
@pytest.mark.slow
def test_every_layout_starts_with_the_same_weights(model: ModelConfig) -> None:
    ((_, _, whole),) = run_ranks(1, weights_on_rank, model, ParallelismConfig())
    stored = SafetensorsFolder(Path(str(model.language_weights)))
    embedding = whole["language_model.embedding.word_embeddings.weight"][1]
    assert torch.equal(embedding, stored.read("model.embed_tokens.weight"))
    for layout, parallelism in LAYOUTS.items():
        seen = set()
        for rank, ranks, named in run_ranks(2, weights_on_rank, model, parallelism):
            for name, (split, part) in named.items():
                assert torch.equal(part, cut(whole[name][1], split, rank, ranks)), (layout, name)
                seen.add(name)
        assert seen == whole.keys(), layout


@pytest.mark.distributed
def test_the_trainer_starts_from_folders(model: ModelConfig, tmp_path: Path) -> None:
    """By the real command, alone and tensor parallel: equal losses."""
    losses = {}
    for ranks in (1, 2):
        config = write_run(tmp_path / str(ranks))
        keys = ("language", "vision", "language_weights", "vision_weights")
        overrides = [f"model.{key}={getattr(model, key)}" for key in keys]
        overrides += [f"parallelism.tensor_model_parallel_size={ranks}", "training.train_steps=4"]
        done = launch("megatron_nvlm.train", ranks, "--config", str(config), *overrides)
        assert "starting with the weights of the Hugging Face folders" in done.stdout
        losses[ranks] = [row["loss"] for row in read_metrics(tmp_path / str(ranks) / "run")]
    torch.testing.assert_close(losses[1], losses[2], rtol=1e-5, atol=0)
