"""A load is a census: weights of the checkpoint that the model has no place for are named, not passed over."""

import dataclasses
from pathlib import Path

import pytest

from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.checkpoint.save_load import CheckpointConfig, Identity, Progress, load_model
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.errors import UserError
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.step import wrap_model
from tests.support.tiny import tiny_config, tiny_model


def test_weights_without_a_place_are_refused(tmp_path: Path, world_of_one: Device) -> None:
    """Cross-attention of one layer in two, read by a model that has it in one in four; settings do not say so."""
    often, seldom = (
        dataclasses.replace(tiny_config("h"), cross_attention=CrossAttentionConfig(interval=interval))
        for interval in (2, 4)
    )
    fp32 = PRECISIONS["fp32"]
    model = tiny_model(often, world_of_one, dtype=fp32.parameter_dtype)
    optimizer, schedule = build_optimizer(OptimizerConfig(1e-3, 1e-4, 2), wrap_model(model, fp32, True), 10, fp32, True)
    optimizer.step()  # makes the moments
    identity = Identity("h", "tiny", "tiny", "0")
    saver = CheckpointSaver(RunDir(tmp_path), CheckpointConfig(), identity, model, optimizer, schedule)
    saver.save(Progress(1, DataPosition(4)), wait=True)
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    load_model(checkpoint, tiny_model(often, world_of_one))
    first = "language_model.decoder.layers.1.cross_attention"
    with pytest.raises(UserError, match=rf"step_00000001 holds \d+ weights that this model has no place for, {first}"):
        load_model(checkpoint, tiny_model(seldom, world_of_one))
