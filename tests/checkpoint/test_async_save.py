"""What a save in the background holds is the state at its beginning, whatever training does meanwhile."""

from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_nvlm.checkpoint import async_save, save_load
from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.checkpoint.save_load import CheckpointConfig, Identity, Progress
from megatron_nvlm.core_compat import keep_checkpoint_process, mend_distributed_optimizer
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.errors import UserError
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.step import wrap_model
from tests.support.equality import Case, layout, make_chunks

pytestmark = pytest.mark.distributed


@pytest.fixture
def state(world_of_one: Device):  # type: ignore[no-untyped-def]
    mend_distributed_optimizer()
    keep_checkpoint_process()
    chunks = make_chunks(Case("h", "mixed", precision="fp32"), layout(1, dist_opt=True), world_of_one.torch_device)
    models = wrap_model(chunks, PRECISIONS["fp32"], use_distributed_optimizer=True)
    settings = OptimizerConfig(max_lr=1e-3, min_lr=1e-3, warmup_steps=0)
    optimizer, scheduler = build_optimizer(settings, models, 5, PRECISIONS["fp32"], use_distributed_optimizer=True)
    for model in models:
        model.zero_grad_buffer()
    optimizer.step()  # makes the moments
    with torch.no_grad():
        for number, tensor in enumerate(moments(optimizer)):
            tensor.fill_(number / 100)
    return chunks, optimizer, scheduler


def moments(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    (part,) = optimizer.chained_optimizers
    return [one[name] for one in part.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


def saver_of(state, run_dir: Path) -> CheckpointSaver:  # type: ignore[no-untyped-def]
    return CheckpointSaver(RunDir(run_dir), CheckpointConfig(), Identity("h", "tiny", "tiny", "0"), *state)


def test_training_may_go_on_while_the_state_is_written(state, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    chunks = state[0]
    saver = saver_of(state, tmp_path)
    at_save = [tensor.clone() for tensor in [*chunks.parameters(), *moments(state[1])]]
    saver.save(Progress(2, DataPosition(8)))
    with torch.no_grad():
        for tensor in [*chunks.parameters(), *moments(state[1])]:
            tensor.fill_(7.0)
    assert not (tmp_path / "checkpoints" / "latest").exists()
    saver.save(Progress(4, DataPosition(16)), wait=True)  # ends the first one before it begins
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step_00000002",
        "step_00000004",
    ]
    path = save_load.checkpoint_to_resume(RunDir(tmp_path), "checksum")
    assert path is not None and path.name == "step_00000004"
    assert save_load.load(path.with_name("step_00000002"), *state) == Progress(2, DataPosition(8))
    for tensor, expected in zip([*chunks.parameters(), *moments(state[1])], at_save, strict=True):
        assert torch.equal(tensor, expected)
    assert saver.take_waited() > 0 == saver.take_waited()


def test_a_writer_that_fails_is_heard_of_at_the_next_save(  # type: ignore[no-untyped-def]
    state, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = saver_of(state, tmp_path)
    saver.save(Progress(2, DataPosition(8)), wait=True)
    monkeypatch.setattr(async_save, "deaf_and_not_alone", lambda: 1 / 0)  # in the writer's process
    saver.save(Progress(4, DataPosition(16)))
    with pytest.raises(UserError, match=r"step_00000004 in .* could not be saved \(rank 0: .*make room"):
        saver.save(Progress(6, DataPosition(24)))
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    saver.finish()
    assert save_load.checkpoint_to_resume(RunDir(tmp_path), "checksum") == tmp_path / "checkpoints" / "step_00000002"
