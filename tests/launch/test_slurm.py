"""The real job script on a real Slurm of two nodes on this host: it trains, stops when asked, requeues itself and ends."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_nvlm.demo import data as demo_data
from tests.support.launch import REPOSITORY, environment
from tests.support.shards import read_metrics

pytestmark = pytest.mark.slurm

MINI_SLURM = Path(__file__).with_name("mini_slurm.sh")
JOB = "launch/pretrain_nvlm_h.sh"
RUN_FILE = "configs/demo_h.yaml"
STEPS = 20


def mini_slurm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(MINI_SLURM), *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """Environment in which sbatch talks to a cluster of two nodes."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm on one host needs root")
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
    if missing:
        pytest.skip(
            f"Slurm is not installed ({', '.join(missing)}); `bash {MINI_SLURM.name} install` does it on Debian"
        )
    started = mini_slurm("start", "2")
    if started.returncode:
        pytest.skip(f"Slurm cannot run here: {started.stderr.strip()}")
    conf = mini_slurm("env").stdout.strip().removeprefix("export SLURM_CONF=")
    yield {**environment(), "SLURM_CONF": conf, "NPROC_PER_NODE": "1"}
    mini_slurm("stop")


def submit(slurm: dict[str, str], log: Path, *arguments: str) -> str:
    """Job number."""
    sbatch = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", f"--output={log}", JOB, *arguments]
    done = subprocess.run(sbatch, env=slurm, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A few samples of the demo's data, and the overrides that make a short run of the demo of them."""
    folder = tmp_path_factory.mktemp("data") / "demo_data"
    demo_data.build(folder, train_samples=64, text_samples=16, heldout_samples=4)
    return [
        f"data.train.0.path={folder}/train_images",
        f"data.train.1.path={folder}/train_text",
        f"data.tokenizer={folder}/tokenizer.json",
        f"training.train_steps={STEPS}",
        "optimizer.warmup_steps=2",
    ]


def job_field(slurm: dict[str, str], job: str, field: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True, timeout=30)
    fields = dict(part.split("=", 1) for part in shown.stdout.split() if "=" in part)
    return fields.get(field, "")


def wait_until(reached, log: Path, seconds: float = 240) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.2)


def steps_done(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def ended(slurm: dict[str, str], job: str) -> bool:
    return job_field(slurm, job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def test_a_job_of_two_nodes_stops_requeues_itself_and_ends(
    slurm: dict[str, str], data: list[str], tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "job.log"
    job = submit(slurm, log, RUN_FILE, f"run_dir={run_dir}", *data)
    wait_until(lambda: steps_done(run_dir) >= 3, log)
    # What Slurm does before the time limit, now.
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=slurm, check=True, timeout=30)
    wait_until(lambda: job_field(slurm, job, "Restarts") == "1", log)
    wait_until(lambda: ended(slurm, job), log)
    text = log.read_text()
    assert job_field(slurm, job, "JobState") == "COMPLETED", text
    assert "start 0: 2 nodes x 1 processes" in text and "start 1: 2 nodes x 1 processes" in text
    assert "back into the queue" in text and "resuming from step" in text and "the run is finished" in text
    assert [row["step"] for row in read_metrics(run_dir)] == list(range(1, STEPS + 1))


def test_a_mistake_in_the_run_file_fails_the_job_before_it_starts(slurm: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    job = submit(slurm, log, RUN_FILE, f"run_dir={tmp_path / 'run'}", "optimizer.max_lrr=1")
    wait_until(lambda: ended(slurm, job), log)
    assert job_field(slurm, job, "JobState") == "FAILED"
    assert "did you mean optimizer.max_lr?" in log.read_text()
    assert not (tmp_path / "run").exists()
