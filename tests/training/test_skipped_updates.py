"""Updates that are left out: which, how many, on all ranks alike, and the same in a run that was interrupted."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.errors import UserError
from megatron_nvlm.exit_codes import DIVERGED
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.skipped_updates import LEAST_STEPS, SkippedUpdates, StabilityConfig, check_stability
from megatron_nvlm.training.step import run_step, wrap_model
from tests.support.launch import launch
from tests.support.shards import read_metrics, write_run
from tests.support.tiny import micro_batch_of, plain_samples, tiny_config, tiny_model

SPIKES = ("stability.grad_norm_spike=1.1", "stability.loss_spike=1.2")
DISTURBED = "tests.support.disturbed_training"


@given(st.lists(st.floats(0.5, 2), min_size=LEAST_STEPS), st.floats(4.1, 1e6))
def test_a_spike_is_a_multiple_of_the_median(norms: list[float], spike: float) -> None:
    updates = SkippedUpdates(StabilityConfig(max_skipped=1, grad_norm_spike=4))
    assert not any(updates.judge(1.0, norm) for norm in norms)
    assert "the gradient norm of" in updates.judge(1.0, spike * 2)
    assert not updates.over_limit
    assert "the loss is nan" in updates.judge(math.nan, 1.0)
    assert "2 of the last" in updates.over_limit


def test_updates_left_out_are_forgotten_after_the_window() -> None:
    updates = SkippedUpdates(StabilityConfig(max_skipped=1, window_steps=LEAST_STEPS))
    for _ in range(3):
        assert updates.judge(1.0, math.inf)
        assert not updates.over_limit
        for _ in range(LEAST_STEPS):
            assert not updates.judge(1.0, 1.0)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (StabilityConfig(max_skipped=-1), "stability.max_skipped is -1"),
        (StabilityConfig(window_steps=3), "stability.window_steps is 3"),
        (StabilityConfig(loss_spike=0.5), "stability.loss_spike is 0.5"),
        (StabilityConfig(grad_norm_spike=math.nan), "stability.grad_norm_spike is nan"),
    ],
)
def test_impossible_limits_are_refused(config: StabilityConfig, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_stability(config)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_that_is_left_out_changes_nothing(precision: str, distributed: bool, world_of_one: Device) -> None:
    kind = PRECISIONS[precision]
    model = tiny_model(tiny_config("h"), world_of_one, dtype=kind.parameter_dtype)
    wrapped = wrap_model(model, kind, distributed)
    optimizer, _ = build_optimizer(OptimizerConfig(1e-3, 1e-4, 2), wrapped, 10, kind, distributed)
    batch = micro_batch_of(plain_samples()[0], "h")

    def weights() -> torch.Tensor:
        return torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()]).clone()

    def step(reason: str) -> float:
        device = world_of_one.torch_device
        result = run_step(wrapped, iter([batch]), 1, device, optimizer, judge=lambda *values: reason)
        assert result.skipped == reason
        return result.grad_norm

    before = weights()
    norm = step("a test")
    assert torch.equal(weights(), before) and norm > 0
    assert step("") == pytest.approx(norm, rel=1e-6)
    assert not torch.equal(weights(), before)


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_is_left_out_by_both_ranks_and_named(tmp_path: Path, monkeypatch) -> None:
    path = write_run(tmp_path, training={"micro_batch_size": 2, "global_batch_size": 4, "train_steps": 6})
    monkeypatch.setenv("SPOILED_STEPS", "3")
    said = launch(DISTURBED, 2, "--config", str(path), "stability.max_skipped=1", "logging.rank_files=true").stdout
    run_dir = tmp_path / "run"
    rows = read_metrics(run_dir)
    assert [row.get("skipped") for row in rows] == [None, None, "the loss is nan", None, None, None]
    assert all(math.isfinite(row["loss"]) == ("skipped" not in row) for row in rows)
    (line,) = map(json.loads, (run_dir / "skipped.jsonl").read_text().splitlines())
    assert line["step"] == 3 and len(line["keys"]) == 4
    assert f"step 3: the update was left out, since the loss is nan; its samples: {', '.join(line['keys'])}" in said
    heartbeat = json.loads((run_dir / "heartbeat.json").read_text())
    assert heartbeat["ranks"] == 2
    (log,) = (run_dir / "logs").iterdir()
    assert log.name == "rank_00001.log" and "rank 1 on" in log.read_text()

    monkeypatch.setenv("SPOILED_STEPS", "2,3")
    ended = launch(
        DISTURBED, 2, "--config", str(path), f"run_dir={tmp_path}/two", "stability.max_skipped=1", check=False
    )
    assert f"exitcode  : {DIVERGED}" in ended.stderr or f"exitcode: {DIVERGED}" in ended.stderr, ended.stderr
    assert "2 of the last 3 updates were left out, over stability.max_skipped of 1" in ended.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_was_interrupted_leaves_out_the_same_updates(tmp_path: Path) -> None:
    path = write_run(tmp_path, training={"micro_batch_size": 1, "global_batch_size": 1, "train_steps": 24})
    spikes = ("stability.max_skipped=10", "stability.window_steps=10", *SPIKES)
    launch("megatron_nvlm.train", 1, "--config", str(path), f"run_dir={tmp_path}/whole", *spikes)
    launch(
        "megatron_nvlm.train", 1, "--config", str(path), "training.train_steps=13", "optimizer.decay_steps=24", *spikes
    )
    launch("megatron_nvlm.train", 1, "--config", str(path), *spikes)
    columns = ("step", "loss", "grad_norm", "skipped")
    whole, resumed = (
        [[row.get(name) for name in columns] for row in read_metrics(tmp_path / name)] for name in ("whole", "run")
    )
    assert resumed == whole
    assert any(row[3] for row in whole[:13]) and any(row[3] for row in whole[13:]), (
        "a test without spikes shows nothing"
    )
