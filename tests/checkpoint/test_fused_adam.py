"""The optimizer's state passes between PyTorch's AdamW and a fused Adam, which keeps its number of updates elsewhere."""

from pathlib import Path
from typing import Any

import megatron.core.optimizer as core_optimizer
import pytest
import torch
from megatron.core.optimizer import distrib_optimizer

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.checkpoint.save_load import CheckpointConfig, Identity, Progress
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.models.initialise import named_parameters
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.step import wrap_model
from tests.support.tiny import tiny_config, tiny_model


class FusedAdam(torch.optim.Optimizer):
    """AdamW as Transformer Engine's and apex's classes have it: updates counted by group, in an int for a C++ function."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, adam_w_mode: bool) -> None:
        assert adam_w_mode
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            step, (beta1, beta2) = group["step"], group["betas"]
            assert isinstance(step, int) and group["bias_correction"] is True
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                assert set(state) == {"exp_avg", "exp_avg_sq"}  # any other name is unknown to the real ones
                gradient, mean, square = parameter.grad, state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(gradient, 1 - beta1)
                square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                denominator = (square / (1 - beta2**step)).sqrt() + group["eps"]
                parameter.addcdiv_(mean / (1 - beta1**step), denominator, value=-group["lr"])


def use(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Megatron-core decides when it is imported, by the packages that are installed."""
    monkeypatch.setattr(core_optimizer, "USING_PYTORCH_OPTIMIZER", not fused)
    monkeypatch.setattr(core_optimizer, "Adam", FusedAdam if fused else torch.optim.AdamW)
    monkeypatch.setattr(distrib_optimizer, "Adam", FusedAdam if fused else torch.optim.Adam)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", fused)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", fused)


def update(model: NVLMModel, optimizer: Any) -> None:
    """One step, with gradients that are functions of the parameter's place and size."""
    for number, (_, parameter) in enumerate(named_parameters(model)):
        values = torch.linspace(-1, 1 + number, parameter.numel(), dtype=parameter.main_grad.dtype)  # type: ignore
        parameter.main_grad.copy_(values.view_as(parameter))  # type: ignore[attr-defined]
    optimizer.step()


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "whole optimizer"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("written", "read"), [("AdamW", "fused"), ("fused", "AdamW"), ("fused", "fused")])
def test_updates_go_on_under_another_adam(
    written: str,
    read: str,
    precision: str,
    distributed: bool,
    tmp_path: Path,
    world_of_one: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = PRECISIONS[precision]

    def make() -> tuple[NVLMModel, Any, Any]:
        model = tiny_model(tiny_config("h"), world_of_one, dtype=numbers.parameter_dtype)
        settings = OptimizerConfig(1e-3, 1e-3, 0)
        return model, *build_optimizer(settings, wrap_model(model, numbers, distributed), 10, numbers, distributed)

    use(written == "fused", monkeypatch)
    before = make()
    update(*before[:2])
    update(*before[:2])
    saver = CheckpointSaver(RunDir(tmp_path), CheckpointConfig(), Identity("h", "tiny", "tiny", "0"), *before)
    saver.save(Progress(2, DataPosition(4)), wait=True)
    update(*before[:2])
    use(read == "fused", monkeypatch)
    after = make()
    save_load.load(tmp_path / "checkpoints" / "step_00000002", *after)
    update(*after[:2])
    expected = dict(named_parameters(before[0]))
    for name, parameter in named_parameters(after[0]):
        torch.testing.assert_close(parameter, expected[name], msg=name)
    # And it can be saved again, with the updates that were made.
    saver = CheckpointSaver(RunDir(tmp_path), CheckpointConfig(), Identity("h", "tiny", "tiny", "0"), *after)
    saver.save(Progress(3, DataPosition(6)), wait=True)
    use(written == "fused", monkeypatch)
    again = make()
    save_load.load(tmp_path / "checkpoints" / "step_00000003", *again)
    update(*before[:2])
    update(*again[:2])
    for name, parameter in named_parameters(again[0]):
        torch.testing.assert_close(parameter, expected[name], msg=name)
