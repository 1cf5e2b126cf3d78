"""Weights or moments that are not finite never become a checkpoint."""

import math
from pathlib import Path

import pytest
import torch

from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.checkpoint.retention import read_latest
from megatron_nvlm.checkpoint.save_load import CheckpointConfig, Identity, Progress
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.errors import UserError
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.step import wrap_model
from tests.support.tiny import tiny_config, tiny_model


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_that_is_not_finite_is_saved(
    precision: str, distributed: bool, tmp_path: Path, world_of_one: Device
) -> None:
    kind = PRECISIONS[precision]
    model = tiny_model(tiny_config("h"), world_of_one, dtype=kind.parameter_dtype)
    optimizer, schedule = build_optimizer(
        OptimizerConfig(1e-3, 1e-4, 2), wrap_model(model, kind, distributed), 10, kind, distributed
    )
    optimizer.step()  # makes the moments
    run_dir = RunDir(tmp_path)
    saver = CheckpointSaver(run_dir, CheckpointConfig(), Identity("h", "tiny", "tiny", "0"), model, optimizer, schedule)
    with pytest.raises(UserError, match="the run has no checkpoint yet: lower optimizer.max_lr"):
        spoil_and_save(saver, model.language_model.decoder.final_layernorm.weight, 1)
    saver.save(Progress(2, DataPosition(8)), wait=True)
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    moment = next(iter(parts[0].optimizer.state.values()))["exp_avg_sq"]
    for tensor, name in ((model.language_model.decoder.final_layernorm.weight, "the weight "), (moment, "exp_avg_sq ")):
        with pytest.raises(
            UserError, match=rf"after step 3 .*{name}.*not finite, so nothing was saved; .*step_00000002"
        ):
            spoil_and_save(saver, tensor, 3)
    assert read_latest(run_dir.checkpoints) == run_dir.checkpoints / "step_00000002"
    saver.save(Progress(3, DataPosition(12)), wait=True)


def spoil_and_save(saver: CheckpointSaver, tensor: torch.Tensor, step: int) -> None:
    """With one value of a tensor infinite, which it is no more afterwards."""
    flat = tensor.data.flatten() if not tensor.is_contiguous() else tensor.data.view(-1)
    kept = flat[-1].clone()
    flat[-1] = math.inf
    try:
        saver.save(Progress(step, DataPosition(4 * step)), wait=True)
    finally:
        flat[-1] = kept
