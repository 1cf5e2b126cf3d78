"""Runs by the real command that go on: under another layout, past a damaged checkpoint, after being killed."""

import random
import shutil
import time
from pathlib import Path

import psutil
import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_nvlm.parallel.device import Device
from tests.support.launch import launch, start
from tests.support.shards import read_metrics, write_run

pytestmark = pytest.mark.distributed

TRAIN = "megatron_nvlm.train"
STEPS = 6
TENSOR_AND_PIPELINE = ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"]
LAYOUTS = {"TP1xPP4": ["pipeline_model_parallel_size=4"], "DP4": []}
slow = pytest.mark.slow


def arguments(run_file: Path, run_dir: Path, *parallelism: str) -> list[str]:
    return ["--config", str(run_file), f"run_dir={run_dir}", *(f"parallelism.{key}" for key in parallelism)]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run_dir)]


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


@pytest.mark.parametrize("variant", ["h", pytest.param("d", marks=slow), pytest.param("x", marks=slow)])
def test_a_run_goes_on_under_another_layout(variant: str, tmp_path: Path, world_of_one: Device) -> None:
    """Losses, and at the end weights, float32 copies and moments of every parameter, are those of a run never stopped."""
    run_file = write_run(
        tmp_path,
        model={"variant": variant},
        training={"train_steps": STEPS, "micro_batch_size": 1},
        optimizer={"decay_steps": STEPS},
        checkpoint={"save_every_steps": 3, "keep_last": 2},
    )
    whole = tmp_path / "uninterrupted"
    launch(TRAIN, 4, *arguments(run_file, whole, *TENSOR_AND_PIPELINE))
    expected = dist_checkpointing.load_plain_tensors(str(checkpoint_folder(whole, STEPS)))
    kinds = {key.split(".")[-1] for key in expected if key.startswith("optimizer")} | {
        part for key in expected for part in key.split(".") if part in ("exp_avg", "exp_avg_sq", "param", "fp32_param")
    }
    assert {"exp_avg", "exp_avg_sq"} <= kinds and kinds & {"param", "fp32_param"}, kinds
    for name, layout in LAYOUTS.items():
        run_dir = tmp_path / name
        (run_dir / "checkpoints").mkdir(parents=True)
        shutil.copytree(checkpoint_folder(whole, 3), checkpoint_folder(run_dir, 3))
        (run_dir / "checkpoints" / "latest").write_text("step_00000003")
        done = launch(TRAIN, 4, *arguments(run_file, run_dir, *layout))
        assert "resuming from step 3" in done.stdout
        for (step, loss, norm), (_, loss_then, norm_then) in zip(losses(run_dir), losses(whole)[3:], strict=True):
            assert loss == pytest.approx(loss_then, rel=1e-5), f"{name}, step {step}"
            assert norm == pytest.approx(norm_then, rel=1e-4), f"{name}, step {step}"
        found = dist_checkpointing.load_plain_tensors(str(checkpoint_folder(run_dir, STEPS)))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            if torch.is_tensor(tensor):
                scale = tensor.float().abs().max().item()
                assert torch.allclose(found[key].float(), tensor.float(), rtol=0, atol=1e-3 * scale + 1e-12), key


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run_file = write_run(tmp_path, optimizer={"decay_steps": 8}, checkpoint={"keep_last": 3})
    whole, run_dir = tmp_path / "uninterrupted", tmp_path / "run"
    launch(TRAIN, 1, *arguments(run_file, whole), "training.train_steps=8")
    base = arguments(run_file, run_dir)
    launch(TRAIN, 2, *base, "training.train_steps=4")
    min(checkpoint_folder(run_dir, 4).glob("*.distcp")).write_bytes(b"torn")
    done = launch(TRAIN, 2, *base, "training.train_steps=6")
    assert f"warning: the newest checkpoint is damaged ({checkpoint_folder(run_dir, 4)}: __0_" in done.stdout
    assert "has 4 bytes instead of" in done.stdout and f"using {checkpoint_folder(run_dir, 2)}" in done.stdout
    assert "resuming from step 2" in done.stdout
    (run_dir / "checkpoints" / "latest").write_text("step_00000009")
    done = launch(TRAIN, 2, *base, "training.train_steps=8", "checkpoint.verify=checksum")
    assert "step_00000009: the folder is not there); using" in done.stdout
    assert "resuming from step 6" in done.stdout
    assert [row[0] for row in losses(run_dir)] == list(range(1, 9))
    for (_, loss, _), (_, expected, _) in zip(losses(run_dir), losses(whole), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
    for path in (run_dir / "checkpoints").glob("step_*/.metadata"):
        path.write_bytes(b"")
    done = launch(TRAIN, 2, *base, "training.train_steps=9", check=False)
    assert done.returncode != 0 and "is whole (" in done.stderr and "Traceback" not in done.stderr.split("error: ")[0]


@pytest.mark.timeout(3600)
@slow
@pytest.mark.parametrize("kills", [3, 20])
def test_a_run_that_is_killed_at_random_moments_ends_as_if_nothing_had_been(kills: int, tmp_path: Path) -> None:
    """SIGKILL to the launcher, the ranks and whatever writes for them, all at once; saves are in flight half the time."""
    steps = 40 + 12 * kills
    run_file = write_run(tmp_path, training={"train_steps": steps})
    whole, run_dir = tmp_path / "uninterrupted", tmp_path / "run"
    launch(TRAIN, 2, *arguments(run_file, whole), timeout=1200)
    moments = random.Random(20261125)
    killed, in_flight, resumed = 0, 0, 0
    for _ in range(kills):
        process = start(TRAIN, 2, *arguments(run_file, run_dir), log=tmp_path / "log")
        begun_at = time.time()
        # A save takes as long as many of these tiny steps, and the next one waits for it.
        further = moments.randint(1, 12)
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            file = run_dir / "metrics.jsonl"
            # The file is cut at the step of the checkpoint when a run goes on, so new lines are steps of this one.
            if file.exists() and file.stat().st_mtime > begun_at and _said_so(tmp_path / "log", further):
                break
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.6))
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        if process.poll() is None:
            killed += 1
        for one in family:
            if one.is_running():
                one.kill()
        process.wait()
        psutil.wait_procs(family, timeout=60)
        in_flight += any((run_dir / "checkpoints").glob(".step_*.partial"))
        log = (tmp_path / "log").read_text()
        assert "error" not in log.lower(), log
        resumed += "resuming from step" in log
    print(f"killed {killed} times, {in_flight} of them while a save was in flight; {resumed} went on")
    if kills > 3:  # few moments may all fall before the first checkpoint is complete
        assert in_flight and resumed, "the moments show nothing"
    assert killed == kills, "it was over too soon to prove anything"
    launch(TRAIN, 2, *arguments(run_file, run_dir), timeout=1200)
    assert losses(run_dir) == losses(whole)


def _said_so(log: Path, lines: int) -> bool:
    return sum(line.startswith("step ") for line in log.read_text().splitlines()) >= lines
