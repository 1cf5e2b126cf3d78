"""NVLM-D computes what the original code computes: numbers of a tiny model with random weights, made by that code.

Weights come in through the table of names (hf/weight_tables.py). The numbers are read from beside the repository and
are not part of it; without them these tests are skipped and say so.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_nvlm.hf.load_weights import load_weights
from megatron_nvlm.hf.weight_tables import nvlm_rows
from megatron_nvlm.models.build import build_model
from megatron_nvlm.models.config import ModelConfig, resolve_model
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.families import languages
from megatron_nvlm.models.families import visions as presets
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.families.vision_family import VisionPreset
from megatron_nvlm.models.initialise import named_parameters
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.weight_rows import convert
from megatron_nvlm.ops.pixel_shuffle import pixel_shuffle
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.parallel.groups import get_groups, get_single_rank_groups
from megatron_nvlm.sequence.assemble import IGNORED_LABEL
from megatron_nvlm.sequence.micro_batch import MicroBatch
from megatron_nvlm.sequence.variants import NVLM_D
from megatron_nvlm.training.step import loss_function

IMAGE_TOKEN = 990
LANGUAGE = LanguagePreset(4, 128, 352, 4, 2, 1024, 1_000_000, "qwen2")
VISION = VisionPreset(3, 64, 160, 4, "RMSNorm", qk_norm=True, qkv_bias=False, tile_size=56)
ROWS = nvlm_rows(NVLM_D, LANGUAGE, VISION, CrossAttentionConfig())
ABSOLUTE, LOSS, RELATIVE = 5e-5, 1e-5, 1e-4


def read_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        weights |= load_file(path)
    return weights


@pytest.fixture(scope="module")
def folder(reference: Path) -> Path:
    return reference / "nvlm_d_tiny"


@pytest.fixture
def model(folder: Path, world_of_one: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[NVLMModel]:
    monkeypatch.setitem(languages.LANGUAGE_PRESETS, "reference", LANGUAGE)
    monkeypatch.setitem(presets.VISION_PRESETS, "reference", VISION)
    built = build_model(
        resolve_model(ModelConfig("d", "reference", "reference")),
        ParallelismConfig(),
        get_groups(),
        get_single_rank_groups(),
        torch.float32,
        world_of_one.torch_device,
    )
    load_weights(built, convert(ROWS, read_weights(folder)))
    yield built


def micro_batch_of(ids: Tensor, labels: Tensor, lengths: list[int]) -> MicroBatch:
    """Padded rows of the original -> one ragged row; its labels stand at the token itself, ours at the one before."""
    rows = torch.cat([row[:length] for row, length in zip(ids, lengths, strict=True)])
    shifted = [
        torch.cat([row[1:length], torch.tensor([IGNORED_LABEL])]) for row, length in zip(labels, lengths, strict=True)
    ]
    is_vision = rows == IMAGE_TOKEN
    index = torch.where(is_vision, is_vision.long().cumsum(0) - 1, -1)
    target = torch.cat(shifted)
    nothing = torch.zeros(0, dtype=torch.long)
    return MicroBatch(
        tokens=torch.where(is_vision, 0, rows),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        labels=target,
        loss_mask=(target != IGNORED_LABEL).float(),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        decoder_vision_index=index,
        context_tokens=nothing,
        context_vision_index=nothing,
        context_intervals=torch.zeros(len(rows), 2, dtype=torch.int32),
        tiles=torch.zeros(0, 3, 56, 56, dtype=torch.uint8),
        keys=(),
        num_tiles=0,
    )


def run_case(model: NVLMModel, inputs: dict[str, Tensor], case: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(mean loss, logits [rows, vocabulary], intermediate features)."""
    ids = inputs[f"{case}.input_ids"]
    mask = inputs.get(f"{case}.attention_mask", torch.ones_like(ids))
    micro_batch = micro_batch_of(ids, inputs[f"{case}.labels"], mask.sum(1).tolist())
    features: dict[str, Tensor] = {}
    encoded = torch.zeros(0, 4, 4 * VISION.hidden_size)
    if f"{case}.pixel_values" in inputs:
        features["vit_features"] = model.encode_patches(inputs[f"{case}.pixel_values"])
        features["pixel_shuffled"] = encoded = pixel_shuffle(features["vit_features"])
        assert model.vision_projection is not None
        vision_tokens = model.vision_projection(features["pixel_shuffled"].flatten(0, 1))
        features["mlp1_out"] = vision_tokens.view(-1, 4, LANGUAGE.hidden_size)
    logits = model(micro_batch, encoded)
    loss_sum, targets, _ = loss_function(micro_batch, model(micro_batch, encoded, with_loss=True))
    return loss_sum / targets, logits, features


@pytest.mark.parametrize("case", ["case1", "case2", "case3"])
def test_features_logits_and_loss(model: NVLMModel, folder: Path, case: str) -> None:
    """Several tiles; two padded rows; text only."""
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    loss, logits, features = run_case(model, inputs, case)
    ids = inputs[f"{case}.input_ids"]
    real = inputs.get(f"{case}.attention_mask", torch.ones_like(ids)).bool()
    torch.testing.assert_close(logits, outputs[f"{case}.logits"][real], rtol=0, atol=ABSOLUTE)
    torch.testing.assert_close(loss, outputs[f"{case}.loss"][0], rtol=0, atol=LOSS)
    for name, feature in features.items():
        if f"{case}.{name}" in outputs:
            torch.testing.assert_close(feature, outputs[f"{case}.{name}"], rtol=0, atol=ABSOLUTE)
    assert case != "case1" or {f"{case}.{name}" for name in features} <= outputs.keys()


def test_every_gradient(model: NVLMModel, folder: Path) -> None:
    loss, _, _ = run_case(model, load_file(folder / "inputs.safetensors"), "case1")
    loss.backward()
    stored = load_file(folder / "grads_case1.safetensors")
    stored.pop("__input__.pixel_values")
    expected = convert(ROWS, stored)
    for name, parameter in named_parameters(model):
        assert parameter.grad is not None
        assert (parameter.grad - expected[name]).norm() <= RELATIVE * expected[name].norm(), name


def test_where_each_epsilon_stands(model: NVLMModel, folder: Path) -> None:
    """Weights so small that the epsilons of the norms decide: a wrong one is off by 1 and more."""
    weights = read_weights(folder)
    for name in json.loads((folder / "eps_probe.json").read_text())["scaled_tensors"]:
        weights[name] = weights[name] * 1e-3
    load_weights(model, convert(ROWS, weights))
    expected = load_file(folder / "eps_probe_outputs.safetensors")
    loss, logits, features = run_case(model, load_file(folder / "inputs.safetensors"), "case1")
    torch.testing.assert_close(logits, expected["logits"][0], rtol=0, atol=ABSOLUTE)
    torch.testing.assert_close(loss, expected["loss"][0], rtol=0, atol=LOSS)
    for name in ("vit_features", "mlp1_out"):
        torch.testing.assert_close(features[name], expected[name], rtol=0, atol=1e-7)


def test_a_wrong_epsilon_would_be_seen(folder: Path, world_of_one: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(LANGUAGE, layernorm_epsilon=1e-5)
    monkeypatch.setitem(languages.LANGUAGE_PRESETS, "reference", wrong)
    monkeypatch.setitem(presets.VISION_PRESETS, "reference", VISION)
    model = build_model(
        resolve_model(ModelConfig("d", "reference", "reference")),
        ParallelismConfig(),
        get_groups(),
        get_single_rank_groups(),
        torch.float32,
        world_of_one.torch_device,
    )
    load_weights(model, convert(ROWS, read_weights(folder)))
    outputs = load_file(folder / "outputs.safetensors")
    _, logits, _ = run_case(model, load_file(folder / "inputs.safetensors"), "case1")
    assert (logits - outputs["case1.logits"][0]).abs().max() > ABSOLUTE
