"""Jobs that make_job writes, on a real Slurm: each is accepted, and each run of a sweep trains in its own directory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_nvlm.commands.make_job import SLURM, main
from tests.support.shards import read_metrics
from tests.support.slurm import RUN_FILE, Cluster, Job, cluster

pytestmark = pytest.mark.slurm
STEPS = 4


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster(16) as running:
        yield running


@pytest.fixture(autouse=True)
def image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTAINER", raising=False)
    monkeypatch.setenv("CONTAINER_IMAGE", "registry/nvlm:1")


@pytest.mark.parametrize("size", ["34b", "72b"])
@pytest.mark.parametrize("target", SLURM)
def test_slurm_accepts_every_job(slurm: Cluster, target: str, size: str, tmp_path: Path) -> None:
    job, sweep = tmp_path / "job.sh", tmp_path / "sweep.txt"
    sweep.write_text("optimizer.max_lr=1e-4\noptimizer.max_lr=2e-4\n")
    options = ["--sweep", str(sweep)] if target == "slurm-sweep" else []
    run_file = f"configs/pretrain_nvlm_h_{size}.yaml"
    assert main(["--target", target, "--config", run_file, "--nodes", "16", "--out", str(job), *options]) == 0
    slurm.call("sbatch", "--test-only", str(job))
    with pytest.raises(AssertionError, match="Requested node configuration is not available|count"):
        slurm.call("sbatch", "--test-only", "--nodes=17", str(job))


@pytest.mark.slow
def test_each_run_of_a_sweep_trains_in_its_own_directory(slurm: Cluster, demo_run: list[str], tmp_path: Path) -> None:
    job, sweep = tmp_path / "job.sh", tmp_path / "sweep.txt"
    sweep.write_text("optimizer.max_lr=1e-3\noptimizer.max_lr=2e-3\n")
    one_rank = ["parallelism.tensor_model_parallel_size=1", f"run_dir={tmp_path}/run"]
    overrides = [*demo_run, *one_rank, f"training.train_steps={STEPS}"]
    sizes = ["--nodes", "1", "--gpus-per-node", "1"]
    files = ["--sweep", str(sweep), "--out", str(job)]
    assert main(["--target", "slurm-sweep", "--config", RUN_FILE, *sizes, *files, *overrides]) == 0
    submit = ["sbatch", "--parsable", "--cpus-per-task=1", f"--output={tmp_path}/%a.log", str(job)]
    number = slurm.call(*submit)
    tasks = [Job(f"{number}_{index}", tmp_path / f"{index}.log", tmp_path / f"run_{index}") for index in range(2)]
    for task in tasks:
        assert slurm.end(task) == "COMPLETED", task.text
        assert "the run is finished" in task.text
    losses = [[row["loss"] for row in read_metrics(task.run_dir)] for task in tasks]
    assert [len(run) for run in losses] == [STEPS, STEPS]
    assert losses[0][0] == losses[1][0] and losses[0][-1] != losses[1][-1]  # the same start, another learning rate
