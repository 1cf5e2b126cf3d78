"""The estimate of activations against what autograd keeps of a real forward pass, on the local backend."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from megatron_nvlm.accounting.flops import ModelSizes, count_work
from megatron_nvlm.estimate.activation_bytes import ActivationModel, ChunkSizes
from megatron_nvlm.estimate.sample import SampleShape, make_micro_batch
from megatron_nvlm.models.config import resolve_model
from megatron_nvlm.models.families.visions import VISION_PRESETS
from megatron_nvlm.models.lora import TARGETS, LoraConfig
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import Device, use_device
from megatron_nvlm.parallel.groups import start_groups
from megatron_nvlm.training.step import loss_function
from megatron_nvlm.training.trainable import COMPONENTS, RECIPES, freeze
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, tiny_model

NO_ADAPTERS = LoraConfig()
TOLERANCE = 0.12
"""Left out of the estimate are indices, masks, rotary angles and statistics of norms, which count in a tiny model."""


def kept_bytes(model: torch.nn.Module, micro_batch) -> int:  # type: ignore[no-untyped-def]
    """Bytes of the storages that autograd keeps between forward and backward, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive.append(tensor)  # an address must not be used again while we count
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_function(micro_batch, model(micro_batch, with_loss=True))
    return sum(storages.values())


@dataclass(frozen=True)
class Kept:
    """Bytes of a micro-batch's activations on one rank."""

    estimated: int
    real: int


def keep(
    device: Device,
    variant: str,
    trainable: tuple[str, ...],
    recompute: str,
    parallelism: ParallelismConfig,
    language: str = "tiny",
    vision: str = "tiny",
    lora: LoraConfig = NO_ADAPTERS,
) -> Kept:
    config = dataclasses.replace(tiny_config(variant), recompute=recompute, language=language, vision=vision, lora=lora)
    model = tiny_model(config, device, parallelism, dtype=torch.bfloat16)
    freeze(model, trainable)
    parts = resolve_model(config)
    sizes = ModelSizes(parts.variant, parts.language, parts.vision, config.cross_attention, recompute, lora=lora)
    size, tokens = parts.vision.tile_size, parts.vision.tokens_per_tile
    micro_batch = make_micro_batch(SampleShape(512, 6, 5), parts.variant, tokens, 1)
    micro_batch = dataclasses.replace(micro_batch, tiles=torch.zeros(7, 3, size, size, dtype=torch.uint8))
    work = count_work(micro_batch, tokens)
    estimate = ActivationModel(sizes, parallelism, torch.bfloat16, trainable, "local").chunk(
        ChunkSizes(4, len(sizes.cross_attention_layers), True, True, True), work
    )
    return Kept(estimate.kept, kept_bytes(model, micro_batch))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("trainable", [COMPONENTS, RECIPES["sft"], RECIPES["pretrain"]], ids=["all", "sft", "pretrain"])
@pytest.mark.parametrize("variant", "dxh")
def test_estimate(variant: str, trainable: tuple[str, ...], recompute: str, world_of_one: Device) -> None:
    kept = keep(world_of_one, variant, trainable, recompute, ParallelismConfig())
    assert kept.estimated == pytest.approx(kept.real, rel=TOLERANCE)


@pytest.mark.parametrize("trainable", [RECIPES["sft"], RECIPES["pretrain"]], ids=["sft", "pretrain"])
def test_estimate_with_head_norms(trainable: tuple[str, ...], world_of_one: Device) -> None:
    kept = keep(world_of_one, "h", trainable, "none", ParallelismConfig(), "tiny_qwen3")
    assert kept.estimated == pytest.approx(kept.real, rel=TOLERANCE)


@pytest.mark.parametrize("targets", [list(TARGETS), ["q_proj"], ["down_proj"]], ids=lambda targets: targets[-1])
def test_estimate_with_adapters(targets: list[str], world_of_one: Device) -> None:
    """Of everything that is kept, and of what adapters add to a frozen language model."""
    trainable = ("vision_projection", "cross_attention", "lora")
    lora = LoraConfig(8, targets=targets)
    kept = keep(world_of_one, "h", trainable, "none", ParallelismConfig(), lora=lora)
    assert kept.estimated == pytest.approx(kept.real, rel=TOLERANCE)
    without = keep(world_of_one, "h", RECIPES["pretrain"], "none", ParallelismConfig())
    assert kept.estimated - without.estimated == pytest.approx(kept.real - without.real, rel=0.05)


@pytest.mark.parametrize("vision", ["tiny_siglip", "tiny_layer_norm"])
@pytest.mark.parametrize("variant", "dxh")
def test_estimate_of_other_encoders(
    vision: str, variant: str, world_of_one: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ten more layers of a trained encoder keep: SigLIP's, and InternViT's in the form of the 300M model."""
    form = dataclasses.replace(VISION_PRESETS["tiny"], normalization="LayerNorm", qk_norm=False, qkv_bias=True)
    preset = {**VISION_PRESETS, "tiny_layer_norm": form}[vision]
    depths = []
    for layers in (2, 12):
        monkeypatch.setitem(VISION_PRESETS, vision, dataclasses.replace(preset, num_layers=layers))
        depths.append(keep(world_of_one, variant, COMPONENTS, "none", ParallelismConfig(), vision=vision))
    shallow, deep = depths
    assert deep.estimated - shallow.estimated == pytest.approx(deep.real - shallow.real, rel=0.02)


def keep_on_two_ranks() -> list[Kept]:
    parallelism = ParallelismConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    device = use_device()
    start_groups(parallelism, device, seed=1)
    return [keep(device, variant, RECIPES["sft"], "none", parallelism) for variant in "dxh"]


@pytest.mark.distributed
def test_estimate_of_sharded_rows() -> None:
    """Half of a tensor-parallel layer's activations; with sequence parallelism also half of those between layers."""
    for rank in run_ranks(2, keep_on_two_ranks):
        for kept in rank:
            assert kept.estimated == pytest.approx(kept.real, rel=TOLERANCE)
