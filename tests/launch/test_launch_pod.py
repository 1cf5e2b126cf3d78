"""Two pods of a job as processes on this host: stopped by SIGTERM, started again, ended by what no start can avoid."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megatron_nvlm.commands.launch_pod import Pod
from megatron_nvlm.exit_codes import DIVERGED, FINAL, NO_PROGRESS, START_AGAIN, USER_ERROR
from megatron_nvlm.runs.restart_policy import Ending
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.runs.start_history import begin, starts_of
from tests.launch.conftest import STEPS
from tests.support.launch import REPOSITORY, environment
from tests.support.ranks import free_port
from tests.support.shards import read_metrics

RUN_FILE = "configs/demo_h.yaml"
JOB = "demo-1201-120000"


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    """End what a failed test leaves: pods, launchers and ranks; not what the checkpoints of earlier tests work with."""
    earlier = set(psutil.Process().children(recursive=True))
    yield
    for child in set(psutil.Process().children(recursive=True)) - earlier:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def start_pods(folder: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """Both pods of a start; the first gets its rendezvous as Kubeflow's controllers give it."""
    port = free_port()
    pods = []
    for index in range(2):
        told = {"PET_NODE_RANK": str(index), "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "megatron_nvlm.commands.launch_pod", f"--job={JOB}"]
        command += ["--nnodes=2", "--nproc-per-node=1", RUN_FILE, f"run_dir={folder}/run", *overrides]
        own = {**environment(), **told, "NODE_NAME": f"n{index}", "POD_IP": "127.0.0.1"}
        with (folder / f"pod{index}.log").open("a") as log:
            pods.append(
                subprocess.Popen(command, env=own, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, text=True)
            )
    return pods


def codes(pods: list[subprocess.Popen[str]]) -> list[int]:
    return [pod.wait(timeout=400) for pod in pods]


def logs(folder: Path) -> str:
    return "".join((folder / f"pod{index}.log").read_text() for index in range(2))


def wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 200
    while not (folder / "run" / "metrics.jsonl").exists() or len(read_metrics(folder / "run")) < steps:
        assert time.monotonic() < deadline, logs(folder)
        time.sleep(0.1)


def test_sigterm_to_one_pod_saves_and_stops_all_and_the_next_start_ends_the_run(
    demo_run: list[str], tmp_path: Path
) -> None:
    run_dir = RunDir.named(tmp_path / "run")
    pods = start_pods(tmp_path, *demo_run)
    wait_for_steps(tmp_path, 3)
    pods[1].send_signal(signal.SIGTERM)
    assert codes(pods) == [START_AGAIN, START_AGAIN], logs(tmp_path)
    assert "asked to stop" in (tmp_path / "pod1.log").read_text() and run_dir.stopped.exists()

    assert codes(start_pods(tmp_path, *demo_run)) == [0, 0], logs(tmp_path)
    assert [row["step"] for row in read_metrics(run_dir.path)] == list(range(1, STEPS + 1))
    starts, unfinished = starts_of(run_dir, JOB)
    assert [start.ending for start in starts] == [Ending.STOPPED, Ending.FINISHED] and unfinished is None


@pytest.mark.slow
def test_a_rank_that_is_killed_asks_for_another_start(demo_run: list[str], tmp_path: Path) -> None:
    pods = start_pods(tmp_path, *demo_run, "training.train_steps=2000")
    wait_for_steps(tmp_path, 2)
    (rank,) = [
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdigit() and is_rank(Path("/proc") / entry, f"run_dir={tmp_path}/run", "RANK=1")
    ]
    os.kill(rank, signal.SIGKILL)
    assert codes(pods) == [START_AGAIN, START_AGAIN], logs(tmp_path)
    assert "(killed by SIGKILL)" in logs(tmp_path)


def is_rank(process: Path, argument: str, variable: str) -> bool:
    try:
        line, environ = (process / "cmdline").read_text().split("\0"), (process / "environ").read_text().split("\0")
    except OSError:
        return False
    is_training = "megatron_nvlm.train" in line and argument in line and variable in environ
    return is_training and "--multiprocessing-fork" not in line and not any("launch_" in word for word in line)


def test_a_mistake_ends_every_pod_before_anything_starts(tmp_path: Path) -> None:
    pods = start_pods(tmp_path, "optimizer.max_lrr=1")
    assert codes(pods) == [USER_ERROR, USER_ERROR]
    assert logs(tmp_path).count("error: ") == 2 and "did you mean optimizer.max_lr?" in logs(tmp_path)


@pytest.mark.parametrize(
    ("statuses", "code", "said"),
    [((1, 1), NO_PROGRESS, "2 starts in a row saved nothing after step 0"), ((0,), 0, "the run is finished")],
)
def test_what_earlier_starts_decided_holds_for_every_pod(
    statuses: tuple[int, ...], code: int, said: str, tmp_path: Path
) -> None:
    run_dir = RunDir.named(tmp_path / "run")
    for status in statuses:
        begin(run_dir, JOB, JOB, ())
        if status == 0:
            run_dir.finished.write_text("9\n")
        ended = [sys.executable, "-m", "megatron_nvlm.commands.job_start", "after", str(run_dir), f"--start={JOB}"]
        subprocess.run([*ended, f"--job={JOB}", f"--status={status}"], env=environment(), cwd=REPOSITORY, check=True)
    assert codes(start_pods(tmp_path)) == [code, code], logs(tmp_path)
    assert logs(tmp_path).count(said) == 2


def test_codes_that_a_controller_may_start_again_are_apart_from_final_ones() -> None:
    assert START_AGAIN > 128 and all(code < 128 for code in FINAL) and DIVERGED in FINAL


@pytest.mark.parametrize("index", [0, 15])
def test_only_the_first_pod_holds_the_rendezvous(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_IP", "10.0.0.7")
    arguments = Pod(JOB, index, 16, 8, "head:29500", 10, 0, ("run.yaml",)).torchrun_arguments()
    assert f"--rdzv-conf=is_host={'true' if index == 0 else 'false'}" in arguments
    assert "--local-addr=10.0.0.7" in arguments
