"""A run file that is changed between two starts: changes take effect and are listed; a failed start changes nothing."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from tests.support.launch import launch
from tests.support.shards import good_samples, read_metrics, write_run, write_samples

pytestmark = pytest.mark.distributed

TRAIN = "megatron_nvlm.train"
STEPS = 4


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a run that has made its steps; its folder is `run` beside it."""
    run_file = write_run(tmp_path_factory.mktemp("changed"), training={"train_steps": STEPS, "micro_batch_size": 1})
    launch(TRAIN, 1, "--config", str(run_file))
    return run_file


@pytest.fixture
def run_dir(stopped: Path, tmp_path: Path) -> Path:
    """A copy of that run's folder, to be changed."""
    return Path(shutil.copytree(stopped.parent / "run", tmp_path / "run"))


def go_on(stopped: Path, run_dir: Path, *overrides: str, check: bool = True) -> tuple[int, str]:
    """Exit status, and all that was printed."""
    done = launch(TRAIN, 1, "--config", str(stopped), f"run_dir={run_dir}", *overrides, check=check)
    return done.returncode, done.stdout + done.stderr


def files(run_dir: Path) -> dict[str, bytes]:
    """What a failed start must leave as it is."""
    return {str(path): path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != "lock"}


def last_block(printed: str) -> str:
    """The launcher's own report, which is the end of what a user reads."""
    return printed.rpartition("Root Cause")[2]


def cosine(step: int, max_lr: float, min_lr: float, warmup: int, decay: int) -> float:
    return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(math.pi * (step - warmup) / (decay - warmup)))


def test_rates_and_steps_follow_the_new_file(stopped: Path, run_dir: Path) -> None:
    changes = ["training.train_steps=8", "optimizer.max_lr=1e-2", "optimizer.weight_decay=3", "optimizer.adam_eps=1e-6"]
    _, printed = go_on(stopped, run_dir, *changes)
    for line in (
        "optimizer.max_lr: 0.001 -> 0.01",
        "training.train_steps: 4 -> 8",
        "optimizer.decay_steps: 4 -> 8",
        "optimizer.weight_decay: 0.1 -> 3",
    ):
        assert f"changed since the checkpoint: {line}" in printed
    rates = [row["learning_rate"] for row in read_metrics(run_dir)]
    assert rates[STEPS:] == pytest.approx([cosine(step, 1e-2, 1e-4, 2, 8) for step in range(5, 9)])
    says = json.loads((run_dir / "checkpoints" / "step_00000008" / "nvlm.json").read_text())["model"]["settings"]
    assert says["optimizer.max_lr"] == 1e-2 and says["training.train_steps"] == 8
    # Still null: extended from its own config.yaml, the run gets a cosine over the new steps as well.
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["optimizer"]["decay_steps"] is None


def test_the_schedule_of_the_checkpoint_is_kept_by_name_alone(stopped: Path, run_dir: Path) -> None:
    changes = ["training.train_steps=6", "optimizer.max_lr=1e-2", "optimizer.weight_decay=3"]
    _, printed = go_on(stopped, run_dir, *changes, "checkpoint.keep_schedule=true")
    assert "optimizer.max_lr: 0.001 -> 0.01 (kept at the old value by checkpoint.keep_schedule)" in printed
    assert [row["learning_rate"] for row in read_metrics(run_dir)][STEPS:] == [1e-4, 1e-4]
    written = yaml.safe_load((run_dir / "config.yaml").read_text())["optimizer"]
    assert (written["max_lr"], written["weight_decay"], written["decay_steps"]) == (1e-3, 0.1, STEPS)


def test_a_failed_start_leaves_the_run_as_it_was(stopped: Path, run_dir: Path) -> None:
    # A checkpoint that does not say its settings: core refuses the missing tensors, which is the last thing that can fail.
    (run_dir / "config.yaml").unlink()
    identity = run_dir / "checkpoints" / f"step_{STEPS:08d}" / "nvlm.json"
    says = json.loads(identity.read_text())
    says["model"] = {name: value for name, value in says["model"].items() if name not in ("settings", "data")}
    identity.write_text(json.dumps(says).ljust(identity.stat().st_size))
    before = files(run_dir)
    status, printed = go_on(stopped, run_dir, "model.cross_attention.qk_norm=true", check=False)
    assert status != 0 and "cannot be loaded" in printed
    assert files(run_dir) == before


def test_cross_attention_that_was_trained_is_not_left_out(stopped: Path, run_dir: Path, tmp_path: Path) -> None:
    """Nor is it missed: in a run that goes on, in one that begins with its weights, and in one that answers."""
    fewer = "model.cross_attention.interval=4"
    before = files(run_dir)
    for arguments in (
        (TRAIN, 1, "--config", str(stopped), f"run_dir={run_dir}", fewer),
        (TRAIN, 1, "--config", str(stopped), f"run_dir={tmp_path}/new", fewer, f"checkpoint.initial_weights={run_dir}"),
        ("megatron_nvlm.generate", 1, "--run-dir", str(run_dir), "--question", "What?", fewer),
    ):
        done = launch(*arguments, check=False)
        assert done.returncode != 0
        assert "error: model.cross_attention.interval was 2 when the checkpoint" in last_block(done.stderr)
    assert files(run_dir) == before


def test_another_order_of_samples_begins_only_if_it_is_allowed(stopped: Path, run_dir: Path, tmp_path: Path) -> None:
    """A set that was built again under the same name is another order, one that has moved is none."""
    moved = shutil.copytree(stopped.parent / "shards", tmp_path / "moved")
    blend = f"data.train=[{{path: {moved}, weight: 3.0}}]"
    _, printed = go_on(stopped, run_dir, blend, "training.train_steps=5")
    assert "another order" not in printed and read_metrics(run_dir)[-1]["consumed_samples"] == 20
    shutil.rmtree(moved)
    write_samples(moved, good_samples(9))
    status, printed = go_on(stopped, run_dir, blend, "training.train_steps=6", check=False)
    assert status != 0 and "data.train give another order of samples than the checkpoint" in last_block(printed)
    _, printed = go_on(stopped, run_dir, blend, "training.train_steps=6", "checkpoint.allow_changes=[data.train]")
    assert "another order of samples by data.train (allowed)" in printed
    assert read_metrics(run_dir)[-1]["consumed_samples"] == 4
    go_on(stopped, run_dir, blend, "training.train_steps=7", "checkpoint.allow_changes=[data.train]")
    assert read_metrics(run_dir)[-1]["consumed_samples"] == 8


def test_optimizer_state_of_another_form_is_refused(stopped: Path, run_dir: Path) -> None:
    status, printed = go_on(stopped, run_dir, "parallelism.use_distributed_optimizer=false", check=False)
    assert status != 0 and "and the optimizer's state has the form of the former" in last_block(printed)
    go_on(stopped, run_dir, "recipe.trainable=[vision_projection]", "training.train_steps=6")
    status, printed = go_on(stopped, run_dir, "training.train_steps=8", check=False)
    assert status != 0 and "recipe lets cross_attention, language_model, vision_model train" in last_block(printed)


def test_a_run_that_diverged_goes_on_from_sound_weights(stopped: Path, run_dir: Path) -> None:
    """And the advice that is printed helps."""
    keys = ["training.train_steps=6"]
    status, printed = go_on(stopped, run_dir, *keys, "optimizer.max_lr=1e37", check=False)
    newest = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    assert status != 0 and f"the newest sound checkpoint is {newest}, from which" in last_block(printed)
    _, printed = go_on(stopped, run_dir, *keys, "optimizer.max_lr=1e-4")
    assert f"resuming from step {STEPS}" in printed and math.isfinite(read_metrics(run_dir)[-1]["loss"])


def test_a_request_to_stop_while_starting_counts(stopped: Path, run_dir: Path) -> None:
    (run_dir / "stop").touch()
    _, printed = go_on(stopped, run_dir, "training.train_steps=8")
    assert "stopped after step 5, saved" in printed and read_metrics(run_dir)[-1]["step"] == 5
    assert not (run_dir / "stop").exists() and not (run_dir / "finished").exists()
    assert (run_dir / "stopped").read_text() == "5\n"
    go_on(stopped, run_dir, "training.train_steps=8")
    assert (run_dir / "finished").read_text() == "8\n" and not (run_dir / "stopped").exists()
