"""Greedy tokens of the original NVLM-D code, with and without the cache; and a vocabulary that ranks do not divide."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.hf.load_weights import load_folder_weights
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.inference import generation
from megatron_nvlm.inference.sampling import Sampling
from megatron_nvlm.models.config import ModelConfig, resolve_model
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.parallel.device import Device, use_device
from megatron_nvlm.parallel.groups import start_groups
from megatron_nvlm.runs.components import make_chunks, open_weights
from megatron_nvlm.sequence.assemble import IGNORED_LABEL, AssembledSample
from megatron_nvlm.sequence.variants import NVLM_D
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support import cacheless
from tests.support.folders import language_folder, vision_folder
from tests.support.ranks import run_ranks

NEVER = -1
"""No token ends an answer."""


def cached(*inputs: Any) -> list[list[int]]:
    """As `cacheless.generate`."""
    *others, length = inputs
    return [answer.ids for answer in generation.generate(*others, Sampling(max_new_tokens=length))]


def sample_of(ids: np.ndarray, place_id: int | None, tiles: np.ndarray) -> PreparedSample:
    """A prompt by its ids, `place_id` where a vision token goes."""
    places = ids == place_id
    none = np.zeros(0, dtype=np.int64)
    rows = AssembledSample(
        tokens=np.where(places, 0, ids),
        labels=np.full(len(ids), IGNORED_LABEL),
        loss_mask=np.zeros(len(ids), dtype=np.float32),
        decoder_vision_index=np.where(places, places.cumsum() - 1, -1),
        context_tokens=none,
        context_vision_index=none,
        context_intervals=np.zeros((len(ids), 2), dtype=np.int32),
        num_tiles=len(tiles),
    )
    return PreparedSample("prompt", rows, tiles, "test")


def pipeline_of(tile_size: int, tokens_per_tile: int) -> SamplePipeline:
    tokenizer = Tokenizer(qwen2_tokenizer(300))
    return SamplePipeline(tokenizer, TilingConfig(tile_size=tile_size), NVLM_D, tokens_per_tile, 512, "chatml", None)


def model_of(config: ModelConfig, parallelism: ParallelismConfig, device: Device) -> Any:
    chunks = make_chunks(resolve_model(config), parallelism, PRECISIONS["fp32"], device.torch_device, seed=1)
    weights = open_weights(resolve_model(config))
    assert weights is not None
    load_folder_weights(chunks, weights)
    return next(iter(chunks)).eval()


@pytest.mark.parametrize("form", [cached, cacheless.generate])
def test_the_original_codes_tokens(reference: Path, world_of_one: Device, form: Any) -> None:
    folder = reference / "nvlm_d_tiny"
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    prompt = inputs["case1.input_ids"][0, : int(expected["gen.prompt_len"])].numpy()
    sample = sample_of(prompt, int(inputs["img_context_token_id"]), inputs["case1.pixel_values"].numpy())
    config = ModelConfig("d", str(folder), str(folder), weights=str(folder))
    model = model_of(config, ParallelismConfig(), world_of_one)
    wanted = expected["gen.ids"][0].tolist()
    assert form(model, [sample], pipeline_of(56, 4), NEVER, len(wanted)) == [wanted]


def answers_on_rank(config: ModelConfig, parallelism: ParallelismConfig, ids: np.ndarray) -> list[list[int]]:
    device = use_device()
    start_groups(parallelism, device, seed=1)
    sample = sample_of(ids, None, np.zeros((0, 3, 28, 28), dtype=np.uint8))
    model = model_of(config, parallelism, device)
    found = generation.generate(model, [sample], pipeline_of(28, 1), NEVER, Sampling(max_new_tokens=12))
    return [answer.ids for answer in found]


@pytest.mark.distributed
def test_columns_without_an_id_are_never_chosen(tmp_path: Path) -> None:
    """All logits are below zero, so that the zeros of a filled-up vocabulary would win."""
    sizes = dict(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    language = language_folder(tmp_path / "language", "qwen2", vocab_size=43, **sizes)
    with torch.no_grad():
        language.model.embed_tokens.weight[:, 0] = 9  # every row points there, and every column away from it
        language.lm_head.weight[:, 0] = -9
    language.save_pretrained(tmp_path / "language")
    small = dict(num_attention_heads=2, num_hidden_layers=1, image_size=(28, 28), patch_size=(14, 14))
    vision_folder(tmp_path / "vision", True, hidden_size=16, intermediate_size=20, **small)
    folders = (str(tmp_path / "language"), str(tmp_path / "vision"))
    config = ModelConfig("d", *folders, language_weights=folders[0], vision_weights=folders[1])
    ids = np.arange(9) * 4
    with torch.no_grad():
        expected = language.generate(torch.from_numpy(ids)[None], max_new_tokens=12, do_sample=False, eos_token_id=None)
    for answers in run_ranks(2, answers_on_rank, config, ParallelismConfig(tensor_model_parallel_size=2), ids):
        assert answers == [expected[0, len(ids) :].tolist()]
