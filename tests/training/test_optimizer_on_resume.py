"""What optimizer and schedule apply after a load: the values that were built, unless the checkpoint's are asked for."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.checkpoint.save_load import CheckpointConfig, Identity, Progress
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.models.initialise import named_parameters
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer, config_in_force
from megatron_nvlm.training.step import wrap_model
from tests.support.tiny import tiny_config, tiny_model

BEFORE = OptimizerConfig(1e-3, 1e-4, 2, decay_steps=10)
NOW = OptimizerConfig(1e-5, 1e-6, 1, 0.5, 0.6, 1e-4, weight_decay=7.0, decay_steps=20)
WSD = OptimizerConfig(1e-3, 1e-4, 2, decay_steps=10, schedule="wsd", wsd_decay_steps=4, wsd_decay_style="minus_sqrt")
OWN = replace(BEFORE, component_lr={"vision_projection": 2.0, "cross_attention": 0.5})
OTHER = replace(NOW, component_lr={"vision_projection": 3.0, "vision_model": 0.1, "cross_attention": 1.0})


def give_gradients(model: NVLMModel) -> None:
    """Other ones to each parameter, so that moments of another parameter are seen."""
    for number, (_, parameter) in enumerate(named_parameters(model)):
        parameter.main_grad.fill_(1 + number)  # type: ignore[attr-defined]


def sizes_by_decay(optimizer: MegatronOptimizer) -> Counter[float]:
    """Number of values by multiple of weight decay."""
    sizes: Counter[float] = Counter()
    for group in optimizer.param_groups:
        sizes[group["wd_mult"]] += sum(parameter.numel() for parameter in group["params"])
    return sizes


def moments(model: NVLMModel, optimizer: MegatronOptimizer) -> dict[str, torch.Tensor]:
    """Main weights, moments and numbers of updates, by the names of the parameters."""
    (core,) = optimizer.chained_optimizers  # type: ignore[attr-defined]
    found = {}
    for name, parameter in named_parameters(model):
        if hasattr(core, "model_param_group_index_map"):
            state = core._get_main_param_and_optimizer_states(parameter)
        else:
            main = getattr(parameter, "main_param", parameter)
            state = {"param": main, **core.optimizer.state[main]}
        found |= {f"{name} {key}": tensor.detach().clone() for key, tensor in state.items()}
    return found


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stored", "now"), [(BEFORE, NOW), (WSD, NOW), (BEFORE, WSD), (BEFORE, OWN), (OWN, OTHER), (OWN, NOW)]
)
def test_first_update_after_a_load(
    stored: OptimizerConfig,
    now: OptimizerConfig,
    precision: str,
    keep: bool,
    distributed: bool,
    tmp_path: Path,
    world_of_one: Device,
) -> None:
    numbers = PRECISIONS[precision]
    model = tiny_model(tiny_config("h"), world_of_one, dtype=numbers.parameter_dtype)
    before, its_schedule = build_optimizer(stored, wrap_model(model, numbers, distributed), 10, numbers, distributed)
    give_gradients(model)
    before.step()  # makes the moments
    its_schedule.step(increment=4)
    identity = Identity("h", "tiny", "tiny", "0")
    saver = CheckpointSaver(RunDir(tmp_path), CheckpointConfig(), identity, model, before, its_schedule)
    saver.save(Progress(4, DataPosition(8)), wait=True)
    made = moments(model, before)
    built = replace(now, component_lr=stored.component_lr) if keep else now  # as runs/start.py does
    optimizer, scheduler = build_optimizer(built, wrap_model(model, numbers, distributed), 20, numbers, distributed)
    save_load.load(tmp_path / "checkpoints" / "step_00000004", model, optimizer, scheduler, keep_schedule=keep)
    wanted = stored if keep else now
    assert config_in_force(built, optimizer, scheduler) == wanted
    assert scheduler.num_steps == 5
    loaded = moments(model, optimizer)
    assert made.keys() == loaded.keys() and all(torch.equal(made[name], loaded[name]) for name in made)
    assert sizes_by_decay(optimizer) == sizes_by_decay(before)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == wanted.weight_decay * group["wd_mult"]
        assert (group["betas"], group["eps"]) == ((wanted.adam_beta1, wanted.adam_beta2), wanted.adam_eps)
        assert group["lr"] == scheduler.get_lr(group) and group["max_lr"] == wanted.max_lr * group["lr_mult"]
    assert {group["lr_mult"] for group in optimizer.param_groups} == {1.0, *wanted.multiples.values()}
