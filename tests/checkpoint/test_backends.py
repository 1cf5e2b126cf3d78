"""A checkpoint does not depend on the backend: modules of Transformer Engine have an `_extra_state` that PyTorch's lack."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.module import MegatronModule

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.checkpoint.save_load import CheckpointConfig, Identity, Progress
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.models import build
from megatron_nvlm.models.backends import LayerNorm, RMSNorm, get_backend
from megatron_nvlm.models.initialise import named_parameters
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.step import wrap_model
from tests.support.tiny import tiny_config, tiny_model

FP32 = PRECISIONS["fp32"]


class WithExtraState:
    """What Transformer Engine's modules keep beside their parameters: nothing, but under a name."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None or len(state) == 0


class OtherRMSNorm(WithExtraState, RMSNorm):
    pass


class OtherLayerNorm(WithExtraState, LayerNorm):
    pass


class NormFactory:
    """As core's TENorm: no class of a norm, but what makes one of either."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> Any:
        made = OtherRMSNorm if config.normalization == "RMSNorm" else OtherLayerNorm
        return made(config, hidden_size, eps)


def make(backend: str, world: Device, monkeypatch: pytest.MonkeyPatch) -> tuple[NVLMModel, Any, Any]:
    """Model, optimizer and schedule; backend `other` has the norms of this file."""
    other = dataclasses.replace(get_backend("local"), rms_norm=NormFactory, layer_norm=NormFactory)
    monkeypatch.setattr(build, "get_backend", lambda name: other if backend == "other" else get_backend(name))
    model = tiny_model(tiny_config("h"), world, dtype=torch.float32)
    optimizer, schedule = build_optimizer(
        OptimizerConfig(1e-3, 1e-4, 2), wrap_model(model, FP32, True), 10, FP32, use_distributed_optimizer=True
    )
    return model, optimizer, schedule


@pytest.mark.parametrize("with_entries", [False, True], ids=["now", "as older versions saved"])
@pytest.mark.parametrize(("written", "read"), [("local", "other"), ("other", "local"), ("other", "other")])
def test_weights_and_optimizer_pass_between_backends(
    written: str, read: str, with_entries: bool, tmp_path: Path, world_of_one: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make(written, world_of_one, monkeypatch)
    before[1].step()  # makes the moments
    with monkeypatch.context() as older:
        if with_entries:
            older.setattr(NVLMModel, "sharded_state_dict", MegatronModule.sharded_state_dict)
        saver = CheckpointSaver(RunDir(tmp_path), CheckpointConfig(), Identity("h", "tiny", "tiny", "0"), *before)
        saver.save(Progress(1, DataPosition(4)), wait=True)
    model, optimizer, schedule = make(read, world_of_one, monkeypatch)
    expected = {name: parameter.clone() for name, parameter in named_parameters(before[0])}
    for number, (_, parameter) in enumerate(named_parameters(model)):
        parameter.data.fill_(number)
    for load in (
        lambda path: save_load.load_model(path, model),
        lambda path: save_load.load(path, model, optimizer, schedule),
    ):
        assert load(tmp_path / "checkpoints" / "step_00000001").step == 1
        assert all(torch.equal(parameter, expected[name]) for name, parameter in named_parameters(model))


def test_a_weight_that_is_missing_is_still_an_error(world_of_one: Device) -> None:
    model = tiny_model(tiny_config("h"), world_of_one)
    state = model.state_dict()
    model.load_state_dict({name: value for name, value in state.items() if not name.endswith("_extra_state")})
    name = next(iter(dict(model.named_parameters())))
    with pytest.raises(RuntimeError, match=f"missing, or have no place: {name}"):
        model.load_state_dict({other: value for other, value in state.items() if other != name})
    with pytest.raises(RuntimeError, match="missing, or have no place: surplus"):
        model.load_state_dict({**state, "surplus": torch.zeros(1)})
