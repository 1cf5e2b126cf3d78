"""D, X and H equal an independent plain-PyTorch form: logits, loss and every gradient, in float64."""

import pytest
import torch

from megatron_nvlm.models.initialise import named_parameters
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.training.step import loss_function
from tests.support import plain_nvlm
from tests.support.tiny import micro_batch_of, plain_samples, tiny_config, tiny_model


@pytest.mark.parametrize(("variant", "qk_norm"), [("d", False), ("x", False), ("h", False), ("h", True), ("x", True)])
def test_logits_loss_and_every_gradient(world_of_one: Device, variant: str, qk_norm: bool) -> None:
    model = tiny_model(tiny_config(variant, qk_norm), world_of_one)
    samples = plain_samples()[-1]
    micro_batch = micro_batch_of(samples, variant)
    logits = model(micro_batch)
    loss, _, _ = loss_function(micro_batch, model(micro_batch, with_loss=True))
    loss.backward()

    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in named_parameters(model)}
    config = plain_nvlm.PlainConfig(variant, qk_norm=qk_norm)
    plain = [plain_nvlm.forward(weights, sample, config) for sample in samples]
    plain_loss = torch.stack([sample_loss for _, sample_loss in plain]).sum()
    plain_loss.backward()

    torch.testing.assert_close(logits, torch.cat([rows for rows, _ in plain]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-9, atol=0)
    compared = 0
    for name, parameter in named_parameters(model):
        expected = weights[name].grad
        assert parameter.grad is not None and expected is not None, name
        scale = expected.norm()
        assert scale > 0, f"{name} has no gradient to compare"
        assert (parameter.grad - expected).norm() <= 1e-9 * scale, name
        compared += 1
    assert compared > 60
