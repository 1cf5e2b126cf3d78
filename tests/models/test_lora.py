"""Adapters: a new one changes nothing, a trained one is W + alpha / rank * B A, and what cannot be is refused."""

import dataclasses

import pytest
import torch

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.config import ModelConfig
from megatron_nvlm.models.initialise import named_parameters
from megatron_nvlm.models.lora import TARGETS, LoraConfig, check_lora
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.parallel.device import Device
from tests.support.tiny import micro_batch_of, plain_samples, tiny_config, tiny_model


def adapted(config: ModelConfig, lora: LoraConfig) -> ModelConfig:
    return dataclasses.replace(config, lora=lora)


def logits(model: NVLMModel, variant: str) -> torch.Tensor:
    return model(micro_batch_of(plain_samples()[0], variant))  # type: ignore[no-any-return]


@pytest.mark.parametrize("variant", "dxh")
def test_new_adapters_change_nothing(variant: str, world_of_one: Device) -> None:
    plain = tiny_model(tiny_config(variant), world_of_one)
    model = tiny_model(adapted(tiny_config(variant), LoraConfig(rank=4)), world_of_one)
    assert torch.equal(logits(model, variant), logits(plain, variant))
    names = {name for name, _ in named_parameters(model)} - {name for name, _ in named_parameters(plain)}
    assert len(names) == 4 * len(TARGETS) * 2 and all(".adapters." in name for name in names)
    first = dict(named_parameters(model))["language_model.decoder.layers.0.mlp.linear_fc2.adapters.down_proj.lora_a"]
    assert first.shape == (4, 352) and 0.9 < float(first.abs().max()) * 352**0.5 <= 1


def test_dropout_of_inputs(world_of_one: Device) -> None:
    """In training alone, and not where the other matrix is zero."""
    model = tiny_model(adapted(tiny_config("d"), LoraConfig(4, dropout=0.5)), world_of_one)
    before = logits(model, "d")
    assert torch.equal(logits(model, "d"), before)
    with torch.no_grad():
        for name, parameter in named_parameters(model):
            if name.endswith("lora_b"):
                parameter.fill_(0.1)
    assert not torch.equal(logits(model, "d"), logits(model, "d"))
    model.eval()
    assert torch.equal(logits(model, "d"), logits(model, "d"))


@pytest.mark.parametrize(
    "config,words",
    [
        (LoraConfig(-1), "model.lora.rank is -1"),
        (LoraConfig(1, alpha=0), "model.lora.alpha is 0"),
        (LoraConfig(1, alpha=float("nan")), "model.lora.alpha is nan"),
        (LoraConfig(1, dropout=1), "model.lora.dropout is 1"),
        (LoraConfig(1, targets=["qkv"]), r"model.lora.targets is \['qkv'\]; name some of q_proj"),
        (LoraConfig(1, targets=[]), r"model.lora.targets is \[\]"),
        (LoraConfig(1, targets=["q_proj", "q_proj"]), "each once"),
    ],
)
def test_impossible_adapters(config: LoraConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_lora(config)
