"""NVLM-X and H change nothing of their language model where they must not: bit for bit, as served, not to a tolerance."""

import pytest
import torch

from megatron_nvlm.models.initialise import component_of, named_parameters
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.parallel.device import Device
from tests.support.tiny import PlainSample, TextRun, micro_batch_of, plain_samples, tiny_config, tiny_model


def base_language_model(like: NVLMModel, device: Device) -> NVLMModel:
    """NVLM-D's model without images is the plain language model; it takes the weights of `like`."""
    base = tiny_model(tiny_config("d"), device, dtype=torch.float32)
    weights = dict(named_parameters(like))
    with torch.no_grad():
        for name, parameter in named_parameters(base):
            if component_of(name) == "language_model":
                parameter.copy_(weights[name])
    return base


TEXT = [PlainSample((TextRun(list(range(9, 40)), False), TextRun([7, 8], True))), PlainSample((TextRun([5, 6], True),))]


@pytest.mark.parametrize("variant", ["x", "h"])
@pytest.mark.parametrize("gate", [0.0, 1e-3, 0.7, -3.0])
def test_text_only_equals_the_language_model_at_any_gate(world_of_one: Device, variant: str, gate: float) -> None:
    model = tiny_model(tiny_config(variant), world_of_one, dtype=torch.float32, gate=gate)
    base = base_language_model(model, world_of_one)
    assert torch.equal(model(micro_batch_of(TEXT, variant)), base(micro_batch_of(TEXT, "d")))


@pytest.mark.parametrize("variant", ["x", "h"])
def test_closed_gates_hide_the_image_and_open_ones_show_it(world_of_one: Device, variant: str) -> None:
    samples = plain_samples()[0]
    micro_batch = micro_batch_of(samples, variant)
    outputs = {}
    for gate in (0.0, 1e-3):
        model = tiny_model(tiny_config(variant), world_of_one, dtype=torch.float32, gate=gate)
        # The same decoder input through a model without cross-attention.
        base = base_language_model(model, world_of_one)
        base.vision_model, base.vision_projection = model.vision_model, model.vision_projection
        outputs[gate] = (model(micro_batch), base(micro_batch))
    assert torch.equal(*outputs[0.0])
    assert not torch.equal(*outputs[1e-3])
    torch.testing.assert_close(*outputs[1e-3], rtol=0, atol=0.1)


def test_a_text_only_sample_beside_an_image_stays_the_language_models(world_of_one: Device) -> None:
    samples = plain_samples()[0]  # two images, then text only
    model = tiny_model(tiny_config("h"), world_of_one, dtype=torch.float64, gate=0.7)
    together = micro_batch_of(samples, "h")
    rows = int(together.cu_seqlens[1])
    alone = micro_batch_of(samples[1:], "h")
    torch.testing.assert_close(model(together)[rows:], model(alone), rtol=1e-12, atol=1e-12)
