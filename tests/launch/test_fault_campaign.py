"""Twenty random faults over a run on two nodes of a real Slurm: the losses and samples of the undisturbed run.

FAULTS=5 and FAULT_SEED=2 make another campaign. The share of useful time is printed (`pytest -s`).
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_nvlm.exit_codes import USER_ERROR
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.runs.start_history import newest_step
from tests.support.launch import launch
from tests.support.shards import read_metrics
from tests.support.slurm import (
    ENDED,
    RUN_FILE,
    Cluster,
    Job,
    cluster,
    damage_newest_checkpoint,
    halve,
    kill,
    mini_slurm,
)

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(7200)]

NODES = 12
"""Nodes that are blamed twice are left out, so that a campaign uses up some."""
SECONDS_A_FAULT = 400
DISK = 400 << 20
"""Bytes of the file system of the run directory."""
LEFT = 1 << 20
"""Bytes that a full one still has: lines of metrics and histories fit, checkpoints do not."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Folder of the job; its run directory is a small file system of its own, mounted before the nodes start."""
    run_dir = tmp_path / "job" / "run"
    run_dir.mkdir(parents=True)
    if os.geteuid() != 0:
        pytest.skip("a file system of its own needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(run_dir)], check=True)
    yield run_dir.parent
    subprocess.run(["umount", "--lazy", str(run_dir)], check=True)


@pytest.fixture
def slurm(folder: Path) -> Iterator[Cluster]:
    with cluster(NODES) as running:
        yield running


@dataclass
class Campaign:
    """A run under faults, and the job that drives it at the moment."""

    slurm: Cluster
    folder: Path
    settings: list[str]
    chance: random.Random
    job: Job

    def kill_a_rank(self) -> None:
        kill(self.chance.choice(self.job.ranks()))

    def stop_a_rank(self) -> None:
        """The watchdog ends the start."""
        self.chance.choice(self.job.ranks()).send_signal(signal.SIGSTOP)

    def ask_to_stop(self) -> None:
        self.slurm.ask_to_stop(self.job)

    def requeue(self) -> None:
        self.slurm.call("scontrol", "requeue", self.job.number)

    def drop_a_node(self) -> None:
        """Power lost on a node of the job; it is back when the fault has done its work."""
        nodes = self.slurm.call("scontrol", "show", "hostnames", self.slurm.field(self.job, "NodeList")).split()
        node, restarts = self.chance.choice(nodes), self.slurm.field(self.job, "Restarts")
        mini_slurm("kill-node", node)
        self.slurm.wait(self.job, lambda: self.slurm.field(self.job, "Restarts") != restarts, SECONDS_A_FAULT)
        assert mini_slurm("start-node", node).returncode == 0

    def damage_the_newest_checkpoint(self) -> None:
        """And have the job start again from an earlier one."""
        damage_newest_checkpoint(self.job)
        self.kill_a_rank()

    def fill_the_disk(self) -> None:
        """The run ends with a sentence; somebody makes room and submits it again."""
        filler = self.job.run_dir / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.job.run_dir).free - LEFT)
        self.ends_by_a_mistake("No space left on device")
        filler.unlink()
        self.submit()

    def break_a_shard(self) -> None:
        """The next start refuses the data; somebody puts the shard back and submits the run again."""
        (data,) = [Path(key.partition("=")[2]) for key in self.settings if key.startswith("data.train.0.path=")]
        shard = self.chance.choice(sorted(data.glob("*.tar")))
        kept = shutil.copy2(shard, self.folder / "kept.tar")
        halve(shard)
        self.kill_a_rank()
        self.ends_by_a_mistake(shard.name)
        shutil.copy2(kept, shard)
        self.submit()

    def ends_by_a_mistake(self, said: str) -> None:
        assert self.slurm.end(self.job, SECONDS_A_FAULT) == "FAILED", self.job.text
        assert self.slurm.field(self.job, "ExitCode") == f"{USER_ERROR}:0", self.job.text
        assert said in self.job.text, self.job.text

    def submit(self) -> None:
        self.job = self.slurm.submit(self.folder, *self.settings, options=("--open-mode=append",), MAX_FAILURES="100")

    def is_ready(self, step: int) -> bool:
        """Whether the job runs and has saved something after `step`, so that no start is without progress."""
        has_progress = newest_step(RunDir(self.job.run_dir)) > step
        runs = self.slurm.state(self.job) == "RUNNING" and len(self.job.ranks()) == 2
        return self.slurm.state(self.job) in ENDED or has_progress and runs


FAULTS: tuple[Callable[[Campaign], None], ...] = (
    Campaign.kill_a_rank,
    Campaign.stop_a_rank,
    Campaign.ask_to_stop,
    Campaign.requeue,
    Campaign.drop_a_node,
    Campaign.damage_the_newest_checkpoint,
    Campaign.fill_the_disk,
    Campaign.break_a_shard,
)


def faults_in_order(count: int, chance: random.Random) -> list[Callable[[Campaign], None]]:
    """Each kind before any comes again, in random order."""
    rounds = [chance.sample(FAULTS, len(FAULTS)) for _ in range(count // len(FAULTS) + 1)]
    return [fault for each in rounds for fault in each][:count]


def test_twenty_random_faults_change_nothing(folder: Path, slurm: Cluster, demo_run: list[str], tmp_path: Path) -> None:
    count, chance = int(os.environ.get("FAULTS", "20")), random.Random(int(os.environ.get("FAULT_SEED", "1")))
    settings = [
        *demo_run,
        f"training.train_steps={12 * count}",
        "training.timeout_seconds=20",
        "checkpoint.save_every_steps=2",
        "checkpoint.keep_last=3",
        "data.ledger=true",
    ]
    alone = tmp_path / "alone"
    launch("megatron_nvlm.train", 2, "--config", RUN_FILE, f"run_dir={alone}", *settings, timeout=900)
    began = time.monotonic()
    campaign = Campaign(slurm, folder, settings, chance, slurm.submit(folder, *settings, MAX_FAILURES="100"))
    for number, fault in enumerate(faults_in_order(count, chance), start=1):
        step = newest_step(RunDir(campaign.job.run_dir))
        slurm.wait(campaign.job, lambda: campaign.is_ready(step), SECONDS_A_FAULT)  # noqa: B023  (called at once)
        job = campaign.job
        assert slurm.state(job) not in ENDED, f"ended before fault {number} of {count}: {job.text}"
        print(f"fault {number} at step {job.steps_done()}: {fault.__name__}", flush=True)
        fault(campaign)
        slurm.wait(campaign.job, lambda: len(campaign.job.ranks()) < 2, SECONDS_A_FAULT)
    assert slurm.end(campaign.job, 900) == "COMPLETED", campaign.job.text
    seconds = time.monotonic() - began
    rows, undisturbed = read_metrics(campaign.job.run_dir), read_metrics(alone)
    assert [row["loss"] for row in rows] == [row["loss"] for row in undisturbed]
    ledgers = [RunDir(run_dir).ledger.read_text() for run_dir in (campaign.job.run_dir, alone)]
    assert ledgers[0] == ledgers[1], "the same samples, each step"
    useful = sum(row["seconds"] for row in rows)
    print(f"{count} faults, {useful:.0f} s of {seconds:.0f} s useful: {useful / seconds:.0%}")
