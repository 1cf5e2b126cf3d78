"""Twenty random faults over a run on two nodes of a real Slurm: the losses and samples of the undisturbed run.

FAULTS=5 and FAULT_SEED=2 make another campaign. The share of useful time is printed (`pytest -s`).
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.runs.start_history import newest_step
from tests.support.launch import launch
from tests.support.shards import read_metrics
from tests.support.slurm import ENDED, RUN_FILE, Cluster, Job, cluster, mini_slurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

NODES = 12
"""Nodes that are blamed twice are left out, so that a campaign uses up some."""
SECONDS_A_FAULT = 240


@pytest.fixture
def slurm() -> Iterator[Cluster]:
    with cluster(NODES) as running:
        yield running


def kill_a_rank(slurm: Cluster, job: Job, chance: random.Random) -> None:
    chance.choice(job.ranks()).send_signal(signal.SIGKILL)


def stop_a_rank(slurm: Cluster, job: Job, chance: random.Random) -> None:
    chance.choice(job.ranks()).send_signal(signal.SIGSTOP)


def ask_to_stop(slurm: Cluster, job: Job, chance: random.Random) -> None:
    slurm.ask_to_stop(job)


def requeue(slurm: Cluster, job: Job, chance: random.Random) -> None:
    slurm.call("scontrol", "requeue", job.number)


def drop_a_node(slurm: Cluster, job: Job, chance: random.Random) -> None:
    """Power lost on a node of the job; it is back when the fault has done its work."""
    nodes = slurm.call("scontrol", "show", "hostnames", slurm.field(job, "NodeList")).split()
    node = chance.choice(nodes)
    mini_slurm("kill-node", node)
    restarts = slurm.field(job, "Restarts")
    slurm.wait(job, lambda: slurm.field(job, "Restarts") != restarts, SECONDS_A_FAULT)
    assert mini_slurm("start-node", node).returncode == 0
    slurm.call("scontrol", "update", f"NodeName={node}", "State=RESUME")


def damage_the_newest_checkpoint(slurm: Cluster, job: Job, chance: random.Random) -> None:
    """And have the job start again from an earlier one."""
    newest = RunDir(job.run_dir).checkpoints / f"step_{newest_step(RunDir(job.run_dir)):08d}"
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with file.open("r+b") as content:
        content.truncate(file.stat().st_size // 2)
    kill_a_rank(slurm, job, chance)


FAULTS: tuple[Callable[[Cluster, Job, random.Random], None], ...] = (
    kill_a_rank,
    stop_a_rank,
    ask_to_stop,
    requeue,
    drop_a_node,
    damage_the_newest_checkpoint,
)


def is_ready(slurm: Cluster, job: Job, step: int) -> bool:
    """Whether the job runs and has saved something new, so that no start is without progress."""
    return (
        slurm.state(job) in ENDED
        or newest_step(RunDir(job.run_dir)) > step
        and slurm.state(job) == "RUNNING"
        and len(job.ranks()) == 2
    )


def test_twenty_random_faults_change_nothing(slurm: Cluster, demo_run: list[str], tmp_path: Path) -> None:
    count, chance = int(os.environ.get("FAULTS", "20")), random.Random(int(os.environ.get("FAULT_SEED", "1")))
    steps = 8 * count
    settings = [
        *demo_run,
        f"training.train_steps={steps}",
        "training.timeout_seconds=20",
        "checkpoint.save_every_steps=2",
        "checkpoint.keep_last=3",
        "data.ledger=true",
    ]
    alone = tmp_path / "alone"
    launch("megatron_nvlm.train", 2, "--config", RUN_FILE, f"run_dir={alone}", *settings, timeout=900)
    began = time.monotonic()
    job = slurm.submit(tmp_path / "job", *settings, MAX_FAILURES="100")
    for number in range(count):
        step = newest_step(RunDir(job.run_dir))
        slurm.wait(job, lambda: is_ready(slurm, job, step), SECONDS_A_FAULT)  # noqa: B023  (called at once)
        if slurm.state(job) in ENDED:
            break
        fault = chance.choice(FAULTS)
        print(f"fault {number + 1} at step {job.steps_done()}: {fault.__name__}", flush=True)
        fault(slurm, job, chance)
        slurm.wait(job, lambda: len(job.ranks()) < 2 or slurm.state(job) in ENDED, SECONDS_A_FAULT)
    assert slurm.end(job, 900) == "COMPLETED", job.text
    seconds = time.monotonic() - began
    rows, undisturbed = read_metrics(job.run_dir), read_metrics(alone)
    assert [row["loss"] for row in rows] == [row["loss"] for row in undisturbed]
    ledgers = [RunDir(folder).ledger.read_text() for folder in (job.run_dir, alone)]
    assert ledgers[0] == ledgers[1], "the same samples, each step"
    useful = sum(row["seconds"] for row in rows)
    print(f"{number + 1} faults, {useful:.0f} s of {seconds:.0f} s useful: {useful / seconds:.0%}")
