"""A real Slurm of several nodes on this host, and the demo's jobs on it."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.runs.start_history import newest_step
from tests.support.launch import REPOSITORY, environment

MINI_SLURM = REPOSITORY / "tests" / "launch" / "mini_slurm.sh"
JOB = "launch/pretrain_nvlm_h.sh"
RUN_FILE = "configs/demo_h.yaml"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def mini_slurm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of mini_slurm.sh."""
    return subprocess.run(["bash", str(MINI_SLURM), *arguments], capture_output=True, text=True, timeout=120)


@dataclass(frozen=True)
class Job:
    """A submitted job, its log and the directory of its run."""

    number: str
    log: Path
    run_dir: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else "no log"

    def steps_done(self) -> int:
        metrics = self.run_dir / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def ranks(self) -> list[psutil.Process]:
        """Processes of its training ranks."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            line, environ = process.info["cmdline"] or [], process.info["environ"] or {}
            if "megatron_nvlm.train" in line and f"run_dir={self.run_dir}" in line and "LOCAL_RANK" in environ:
                if "launch_node" not in " ".join(line) and "--multiprocessing-fork" not in line:
                    found.append(process)
        return found


@dataclass(frozen=True)
class Cluster:
    """The Slurm that runs."""

    environment: dict[str, str]

    def call(self, *command: str) -> str:
        """One of Slurm's commands; what it prints."""
        done = subprocess.run(command, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(
        self,
        folder: Path,
        *overrides: str,
        options: tuple[str, ...] = (),
        script_options: tuple[str, ...] = (),
        **own: str,
    ) -> Job:
        """The demo on two nodes; its run goes to `folder`.

        Args:
            options: of sbatch. script_options: of the script.
            own: environment of the job.
        """
        folder.mkdir(exist_ok=True)
        log, run_dir = folder / "job.log", folder / "run"
        sbatch = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", f"--output={log}", *options, JOB]
        done = subprocess.run(
            [*sbatch, *script_options, RUN_FILE, f"run_dir={run_dir}", *overrides],
            env={**self.environment, **own},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return Job(done.stdout.strip(), log, run_dir)

    def field(self, job: Job, name: str) -> str:
        """A field of `scontrol show job`."""
        shown = self.call("scontrol", "show", "job", job.number)
        fields = dict(part.split("=", 1) for part in shown.split() if "=" in part)
        return fields.get(name, "")

    def state(self, job: Job) -> str:
        return self.field(job, "JobState")

    def wait(self, job: Job, reached: Callable[[], bool], seconds: float = 300) -> None:
        """Until something is so; a job that ended instead fails the test with its log."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, job.text
            assert self.state(job) not in ENDED or reached(), job.text
            time.sleep(0.2)

    def end(self, job: Job, seconds: float = 420) -> str:
        """Wait for the end of a job; its state."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in ENDED:
            assert time.monotonic() < deadline, job.text
            time.sleep(0.2)
        return state

    def wait_for_chain(self, job: Job, seconds: float = 420) -> None:
        """Until no job of a chain is left."""
        deadline = time.monotonic() + seconds
        while self.call("squeue", "--noheader", "--jobs", job.number):
            assert time.monotonic() < deadline, job.text
            time.sleep(0.5)

    def ask_to_stop(self, job: Job) -> None:
        """What Slurm does before the time limit, now, to the job or to that of its chain which runs."""
        (number,) = self.call("squeue", "--noheader", "--states=RUNNING", "--jobs", job.number, "--format=%A").split()
        self.call("scancel", "--batch", "--signal=USR1", number)


@contextmanager
def cluster(nodes: int) -> Iterator[Cluster]:
    """Start a Slurm of so many nodes, or skip the test and say why."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm on one host needs root")
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
    if missing:
        pytest.skip(
            f"Slurm is not installed ({', '.join(missing)}); `bash {MINI_SLURM.name} install` does it on Debian"
        )
    started = mini_slurm("start", str(nodes))
    if started.returncode:
        pytest.skip(f"Slurm cannot run here: {started.stderr.strip()}")
    conf = mini_slurm("env").stdout.strip().removeprefix("export SLURM_CONF=")
    own = {name: value for name, value in environment().items() if not name.startswith("SLURM_")}
    try:
        yield Cluster({**own, "SLURM_CONF": conf, "NPROC_PER_NODE": "1"})
    finally:
        mini_slurm("stop")


def kill(process: psutil.Process) -> None:
    """As the kernel does when memory runs out."""
    process.send_signal(signal.SIGKILL)


def halve(file: Path) -> None:
    """Cut the second half of a file off."""
    with file.open("r+b") as content:
        content.truncate(file.stat().st_size // 2)


def damage_newest_checkpoint(job: Job) -> Path:
    """Halve the largest file of the newest complete checkpoint; its folder."""
    run_dir = RunDir(job.run_dir)
    newest = run_dir.checkpoints / f"step_{newest_step(run_dir):08d}"
    halve(max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    return newest
