"""What optimizer and schedule apply after a load: the values that were built, unless the checkpoint's are asked for."""

from pathlib import Path

import pytest

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.checkpoint.save_load import CheckpointConfig, Identity, Progress
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer, config_in_force
from megatron_nvlm.training.step import wrap_model
from tests.support.tiny import tiny_config, tiny_model

BEFORE = OptimizerConfig(1e-3, 1e-4, 2, decay_steps=10)
NOW = OptimizerConfig(1e-5, 1e-6, 1, 0.5, 0.6, 1e-4, weight_decay=7.0, decay_steps=20)
WSD = OptimizerConfig(1e-3, 1e-4, 2, decay_steps=10, schedule="wsd", wsd_decay_steps=4, wsd_decay_style="minus_sqrt")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(("stored", "now"), [(BEFORE, NOW), (WSD, NOW), (BEFORE, WSD)])
def test_first_update_after_a_load(
    stored: OptimizerConfig, now: OptimizerConfig, keep: bool, distributed: bool, tmp_path: Path, world_of_one: Device
) -> None:
    fp32 = PRECISIONS["fp32"]
    model = tiny_model(tiny_config("h"), world_of_one, dtype=fp32.parameter_dtype)
    before, its_schedule = build_optimizer(stored, wrap_model(model, fp32, distributed), 10, fp32, distributed)
    before.step()  # makes the moments
    its_schedule.step(increment=4)
    identity = Identity("h", "tiny", "tiny", "0")
    saver = CheckpointSaver(RunDir(tmp_path), CheckpointConfig(), identity, model, before, its_schedule)
    saver.save(Progress(4, DataPosition(8)), wait=True)
    optimizer, scheduler = build_optimizer(now, wrap_model(model, fp32, distributed), 20, fp32, distributed)
    save_load.load(tmp_path / "checkpoints" / "step_00000004", model, optimizer, scheduler, keep_schedule=keep)
    wanted = stored if keep else now
    assert config_in_force(now, optimizer, scheduler) == wanted
    assert scheduler.num_steps == 5
    for group in optimizer.param_groups:
        assert group["weight_decay"] == wanted.weight_decay * group["wd_mult"]
        assert (group["betas"], group["eps"]) == ((wanted.adam_beta1, wanted.adam_beta2), wanted.adam_eps)
        assert group["lr"] == scheduler.get_lr(group) and group["max_lr"] == wanted.max_lr
