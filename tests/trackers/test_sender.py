"""What trackers are sent: every step once, under one id, whatever fails between; and training is never held up by it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_nvlm.commands.send_metrics import main as send_main
from megatron_nvlm.config.load import load_run
from megatron_nvlm.errors import UserError
from megatron_nvlm.runs.resolve import resolve_run
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.trackers.config import MlflowConfig, WandbConfig, check_installed
from megatron_nvlm.trackers.sender import Sender, alone, step_numbers
from megatron_nvlm.trackers.tracker import Ending, StepNumbers, TrackedRun
from tests.commands.test_watch import write_steps
from tests.support.launch import REPOSITORY, environment, launch, start
from tests.support.shards import write_run

HAS = {name: importlib.util.find_spec(name) is not None for name in ("wandb", "mlflow")}
NEEDS_WANDB = pytest.mark.skipif(not HAS["wandb"], reason="wandb is not installed (pip install wandb)")
NEEDS_MLFLOW = pytest.mark.skipif(not HAS["mlflow"], reason="MLflow is not installed (pip install mlflow-skinny)")
NOWHERE = "http://127.0.0.1:9"
"""Where nothing listens: what a node without a network meets at once."""


class Notebook:
    """A tracker that keeps what it gets, and fails when it is told to."""

    name = "notebook"

    def __init__(self) -> None:
        self.opened: list[str | None] = []
        self.steps: list[int] = []
        self.endings: list[Ending] = []
        self.fails = ""

    def open(self, run_id: str | None, run: TrackedRun) -> str:
        self._fail("open")
        self.opened.append(run_id)
        return run_id or "id-1"

    def send(self, steps: Sequence[StepNumbers]) -> None:
        self._fail("send")
        self.steps += [step for step, _ in steps]

    def close(self, ending: Ending) -> None:
        self._fail("close")
        self.endings.append(ending)

    def _fail(self, what: str) -> None:
        if self.fails == what:
            raise ConnectionError(f"no network for {what}\nand more")


def sender_of(notebook: Notebook, run_dir: Path) -> Sender:
    return Sender(notebook, TrackedRun("run", run_dir, {}))


def test_steps_go_once_and_under_one_id(tmp_path: Path) -> None:
    notebook = Notebook()
    sender = sender_of(notebook, tmp_path)
    sender.go_on()
    write_steps(tmp_path, {}, {})
    sender.go_on()
    write_steps(tmp_path, {}, first=3)
    sender.close(Ending.STOPPED)
    assert notebook.steps == [1, 2, 3] and notebook.opened == [None] and notebook.endings == [Ending.STOPPED]
    # The run goes on from step 2, and makes step 3 again.
    write_steps(tmp_path, {}, {}, first=4)
    again = sender_of(notebook, tmp_path)
    again.close(Ending.FINISHED)
    assert notebook.steps == [1, 2, 3, 4, 5] and notebook.opened == [None, "id-1"]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"notebook": {"id": "id-1", "step": 5}}


@pytest.mark.parametrize("what", ["open", "send", "close"])
def test_without_a_network_steps_wait_in_the_run_directory(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = Notebook()
    notebook.fails = what
    sender = sender_of(notebook, tmp_path)
    write_steps(tmp_path, {}, {})
    for _ in range(3):
        sender.go_on(at_once=True)
    sender.close(Ending.FINISHED)
    said = capsys.readouterr().err
    assert said.count("\n") == 1, "it is said once"
    assert f"notebook does not take metrics (no network for {what}); training goes on" in said
    assert notebook.steps == ([1, 2] if what == "close" else [])
    notebook.fails = ""
    write_steps(tmp_path, {}, first=3)
    sender.go_on(at_once=True)
    assert notebook.steps == [1, 2, 3] and not sender.failure


def test_a_failure_is_not_tried_again_at_once(tmp_path: Path) -> None:
    notebook = Notebook()
    notebook.fails = "open"
    sender = sender_of(notebook, tmp_path)
    sender.go_on()
    notebook.fails = ""
    sender.go_on()
    assert notebook.opened == []


def test_numbers_of_a_step() -> None:
    record: dict[str, Any] = {"step": 7, "loss": 1.5, "seconds": 2.0, "samples": 8, "gates": {"layer_1": 0.5}}
    step, numbers = step_numbers({**record, "skipped": "a spike", "stragglers": [{"rank": 1}, {"rank": 2}]})
    assert step == 7 and "step" not in numbers
    assert numbers["samples_per_second"] == 4 and numbers["gates/layer_1"] == 0.5
    assert numbers["skipped"] == 1 and numbers["stragglers"] == 2
    assert step_numbers(record)[1]["skipped"] == 0


def test_one_sender_a_run(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with alone(RunDir(tmp_path)), pytest.raises(UserError, match="another process sends the metrics"):
        with alone(RunDir(tmp_path), seconds=0.3):
            pass


@pytest.mark.parametrize(("name", "key"), [("wandb", "logging.wandb.project"), ("mlflow", "logging.mlflow.uri")])
def test_a_missing_package_is_one_sentence(name: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    check_installed(WandbConfig(), MlflowConfig())
    wandb = WandbConfig(project="a" if name == "wandb" else None)
    mlflow = MlflowConfig(uri="b" if name == "mlflow" else None)
    with pytest.raises(UserError, match=rf"{key} is set and the package {name} is not installed; pip install"):
        check_installed(wandb, mlflow)


@pytest.mark.distributed
@pytest.mark.skipif(all(HAS.values()), reason="both trackers are installed")
def test_training_refuses_a_missing_package_before_any_work(tmp_path: Path) -> None:
    missing = "logging.mlflow.uri=a" if not HAS["mlflow"] else "logging.wandb.project=a"
    run_file = write_run(tmp_path)
    done = launch("megatron_nvlm.train", 1, "--config", str(run_file), missing, check=False)
    assert done.returncode != 0 and "is not installed; pip install" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_sent_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert send_main([str(tmp_path / "none")]) == 2
    assert "there is no run directory" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("logging: {tensorboard: true}\n")
    assert send_main([str(tmp_path)]) == 2
    assert "names no tracker" in capsys.readouterr().err


def mlflow_runs(folder: Path) -> list[Any]:
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=str(folder))
    experiment = client.get_experiment_by_name("megatron_nvlm")
    return [*client.search_runs([experiment.experiment_id])] if experiment else []


def mlflow_losses(folder: Path, run_id: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    history = MlflowClient(tracking_uri=str(folder)).get_metric_history(run_id, "loss")
    return sorted((metric.step, metric.value) for metric in history)


def known(run_dir: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((run_dir / "trackers.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.distributed
@NEEDS_WANDB
@NEEDS_MLFLOW
def test_a_run_that_goes_on_is_taken_up_under_the_same_id(tmp_path: Path) -> None:
    """Really trained on two ranks, stopped after three steps and continued; both packages, without a network."""
    run_file = write_run(tmp_path)
    run_dir, folder = tmp_path / "run", tmp_path / "mlflow"
    trackers = ["logging.wandb={project: p, mode: offline}", f"logging.mlflow.uri={folder}"]
    short = ["training.train_steps=3", "optimizer.decay_steps=6"]
    launch("megatron_nvlm.train", 2, "--config", str(run_file), *trackers, *short)
    first = known(run_dir)
    assert first["wandb"]["step"] == first["mlflow"]["step"] == 3
    (stored,) = mlflow_runs(folder)
    assert stored.info.status == "FINISHED" and stored.data.params["training.train_steps"] == "3"
    launch("megatron_nvlm.train", 2, "--config", str(run_file), *trackers)
    last = known(run_dir)
    assert {name: one["id"] for name, one in first.items()} == {name: one["id"] for name, one in last.items()}
    (stored,) = mlflow_runs(folder)  # one run, and one rank has written it
    assert stored.info.status == "FINISHED" and stored.info.run_id == last["mlflow"]["id"]
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert mlflow_losses(folder, stored.info.run_id) == [(step["step"], step["loss"]) for step in steps]
    assert "gates/layer_1" in stored.data.metrics and stored.data.metrics["samples_per_second"] > 0
    parts = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and all(part.name.endswith(last["wandb"]["id"]) for part in parts)
    assert all(b"gates/layer_1" in next(part.glob("*.wandb")).read_bytes() for part in parts)


@pytest.mark.distributed
@NEEDS_MLFLOW
def test_no_server_holds_up_no_training_and_the_steps_are_sent_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = write_run(tmp_path, training={"train_steps": 3})
    run_dir, folder = tmp_path / "run", tmp_path / "mlflow"
    done = launch("megatron_nvlm.train", 1, "--config", str(run_file), f"logging.mlflow.uri={NOWHERE}")
    assert "finished after step 3" in done.stdout
    assert "mlflow does not take metrics" in done.stderr and "training goes on" in done.stderr
    assert send_main([str(run_dir)]) == 2
    assert "mlflow did not take the metrics" in capsys.readouterr().err
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["logging"]["mlflow"]["uri"] = str(folder)  # the server answers
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    assert send_main([str(run_dir)]) == 0
    assert "steps 1 to 3 sent" in capsys.readouterr().out
    (stored,) = mlflow_runs(folder)
    assert [step for step, _ in mlflow_losses(folder, stored.info.run_id)] == [1, 2, 3]
    assert stored.info.status == "FINISHED"


def _sends(process: psutil.Process) -> bool:
    try:
        return "megatron_nvlm.trackers.sender" in process.cmdline()
    except psutil.Error:  # it has ended
        return False


@pytest.mark.distributed
@NEEDS_MLFLOW
def test_a_killed_training_leaves_no_sender_and_a_failed_run(tmp_path: Path) -> None:
    """With loader processes, which training forks, and which hold copies of its open files."""
    run_file = write_run(tmp_path, training={"train_steps": 100_000}, data={"num_workers": 1})
    run_dir, folder = tmp_path / "run", tmp_path / "mlflow"
    training = start(
        "megatron_nvlm.train", 1, "--config", str(run_file), f"logging.mlflow.uri={folder}", log=tmp_path / "log"
    )
    deadline = time.monotonic() + 120
    while not (run_dir / "trackers.json").exists() or not known(run_dir)["mlflow"]["step"]:
        assert time.monotonic() < deadline and training.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    processes = [psutil.Process(training.pid), *psutil.Process(training.pid).children(recursive=True)]
    senders = [one for one in processes if one.is_running() and _sends(one)]
    assert len(senders) == 1
    senders[0].send_signal(signal.SIGTERM)  # as a job's end gives to every process: it waits for training's word
    for process in processes:
        if process not in senders and process.is_running():
            process.kill()
    gone, alive = psutil.wait_procs(senders, timeout=90)
    assert gone and not alive
    training.wait(60)
    (stored,) = mlflow_runs(folder)
    assert stored.info.status == "FAILED"
    written = [
        json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines(True) if line[-1] == "\n"
    ]
    assert len(mlflow_losses(folder, stored.info.run_id)) == len(written)


@NEEDS_WANDB
def test_wandb_without_a_network_or_a_key_ends_nothing(tmp_path: Path) -> None:
    write_steps(tmp_path, {}, {})
    (tmp_path / "config.yaml").write_text("logging: {wandb: {project: p, mode: online}}\n")
    own = {"WANDB_BASE_URL": NOWHERE, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    inherited = {name: value for name, value in environment().items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-m", "tools.send_metrics", str(tmp_path)],
        cwd=REPOSITORY,
        env={**inherited, **own},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2 and "wandb does not take metrics" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_run_files_have_both_sections() -> None:
    overrides = ["parallelism.tensor_model_parallel_size=1", "logging.wandb.project=p", "logging.mlflow.uri=m"]
    run = resolve_run(load_run("demo_h", overrides), world_size=1)
    assert run.config.logging.wandb.project == "p" and run.config.logging.mlflow.uri == "m"
