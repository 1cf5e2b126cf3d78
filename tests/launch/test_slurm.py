"""The real job script on a real Slurm of three nodes on this host: it trains, and survives what clusters do."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.conftest import STEPS
from tests.support.launch import launch
from tests.support.shards import read_metrics
from tests.support.slurm import RUN_FILE, Cluster, Job, cluster, damage_newest_checkpoint, kill, mini_slurm

pytestmark = pytest.mark.slurm

TP2 = "parallelism.tensor_model_parallel_size=2"
PP2 = ("parallelism.tensor_model_parallel_size=1", "parallelism.pipeline_model_parallel_size=2")
STEPS_OF_SHORT_STARTS = 4
FAULTY_NODE = """
import os, signal
if os.environ.get("FAULTY_NODE") == os.uname().nodename and "LOCAL_RANK" in os.environ:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster(3) as running:
        yield running


def losses_alone(folder: Path, *overrides: str) -> list[float]:
    """Of torchrun by itself, never interrupted."""
    launch("megatron_nvlm.train", 2, "--config", RUN_FILE, f"run_dir={folder}", *overrides)
    return losses(folder)


def losses(run_dir: Path) -> list[float]:
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, demo_run: list[str]) -> list[float]:
    return losses_alone(tmp_path_factory.mktemp("alone") / "run", *demo_run)


def completed(slurm: Cluster, job: Job) -> None:
    assert slurm.end(job) == "COMPLETED", job.text
    assert "the run is finished" in job.text


def test_a_job_of_two_nodes_stops_requeues_itself_and_ends(slurm: Cluster, demo_run: list[str], tmp_path: Path) -> None:
    job = slurm.submit(tmp_path, *demo_run)
    slurm.wait(job, lambda: job.steps_done() >= 3)
    slurm.ask_to_stop(job)
    slurm.wait(job, lambda: slurm.field(job, "Restarts") == "1")
    completed(slurm, job)
    assert "start 0: 2 nodes x 1 processes" in job.text and "start 1: 2 nodes x 1 processes" in job.text
    assert "back into the queue" in job.text and "resuming from step" in job.text
    assert [row["step"] for row in read_metrics(job.run_dir)] == list(range(1, STEPS + 1))


def test_a_mistake_in_the_run_file_fails_the_job_before_it_starts(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.submit(tmp_path, "optimizer.max_lrr=1")
    assert slurm.end(job) == "FAILED"
    assert slurm.field(job, "ExitCode") == "2:0"
    assert "did you mean optimizer.max_lr?" in job.text
    assert not job.run_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(TP2,), PP2], ids=["TP2", "PP2"])
def test_layouts_across_two_nodes_have_the_losses_of_torchrun_alone(
    slurm: Cluster, demo_run: list[str], tmp_path: Path, layout: tuple[str, ...]
) -> None:
    alone = losses_alone(tmp_path / "alone", *demo_run, *layout)
    job = slurm.submit(tmp_path, *demo_run, *layout)
    completed(slurm, job)
    assert losses(job.run_dir) == alone


@pytest.mark.slow
def test_three_time_limits_in_a_row_change_no_digit(
    slurm: Cluster, demo_run: list[str], tmp_path: Path, undisturbed: list[float]
) -> None:
    job = slurm.submit(tmp_path, *demo_run)
    for limit in range(1, 4):
        before = job.steps_done()
        slurm.wait(job, lambda: job.steps_done() >= before + 3)  # noqa: B023  (called at once)
        slurm.ask_to_stop(job)
        slurm.wait(job, lambda: slurm.field(job, "Restarts") == str(limit))  # noqa: B023
    completed(slurm, job)
    assert losses(job.run_dir) == undisturbed


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_job_goes_on(
    slurm: Cluster, demo_run: list[str], tmp_path: Path, undisturbed: list[float]
) -> None:
    job = slurm.submit(tmp_path, *demo_run)
    slurm.wait(job, lambda: job.steps_done() >= 6)
    kill(job.ranks()[0])
    completed(slurm, job)
    assert "killed by SIGKILL" in job.text and "resuming from step" in job.text
    assert losses(job.run_dir) == undisturbed


@pytest.mark.slow
def test_requeue_by_an_operator_saves_and_goes_on(
    slurm: Cluster, demo_run: list[str], tmp_path: Path, undisturbed: list[float]
) -> None:
    job = slurm.submit(tmp_path, *demo_run)
    slurm.wait(job, lambda: job.steps_done() >= 6)
    slurm.call("scontrol", "requeue", job.number)
    completed(slurm, job)
    assert losses(job.run_dir) == undisturbed


@pytest.mark.slow
def test_a_lost_node_is_replaced(slurm: Cluster, demo_run: list[str], tmp_path: Path, undisturbed: list[float]) -> None:
    job = slurm.submit(tmp_path, *demo_run)
    slurm.wait(job, lambda: job.steps_done() >= 6)
    batch_host = slurm.field(job, "BatchHost")
    lost = next(name for name in ("n1", "n2", "n3") if name != batch_host and name in hosts(slurm, job))
    mini_slurm("kill-node", lost)
    try:
        completed(slurm, job)
    finally:
        assert mini_slurm("start-node", lost).returncode == 0
    assert losses(job.run_dir) == undisturbed


def hosts(slurm: Cluster, job: Job) -> list[str]:
    return slurm.call("scontrol", "show", "hostnames", slurm.field(job, "NodeList")).split()


@pytest.mark.slow
def test_a_drained_node_lets_the_job_end_there(
    slurm: Cluster, demo_run: list[str], tmp_path: Path, undisturbed: list[float]
) -> None:
    job = slurm.submit(tmp_path, *demo_run)
    slurm.wait(job, lambda: job.steps_done() >= 3)
    drained = hosts(slurm, job)[0]
    slurm.call("scontrol", "update", f"NodeName={drained}", "State=DRAIN", "Reason=test")
    try:
        slurm.ask_to_stop(job)  # what an operator does who wants the node
        slurm.wait(job, lambda: slurm.field(job, "Restarts") == "1")
        slurm.wait(job, lambda: slurm.state(job) == "RUNNING")
        assert drained not in hosts(slurm, job)
        completed(slurm, job)
    finally:
        slurm.call("scontrol", "update", f"NodeName={drained}", "State=RESUME")
    assert losses(job.run_dir) == undisturbed


@pytest.mark.slow
def test_a_node_that_always_fails_is_excluded_at_the_second_time(
    slurm: Cluster, demo_run: list[str], tmp_path: Path, undisturbed: list[float]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULTY_NODE)
    path = f"{tmp_path}:{slurm.environment['PYTHONPATH']}"
    job = slurm.submit(tmp_path, *demo_run, options=("--nodelist=n1",), PYTHONPATH=path, FAULTY_NODE="n2")
    slurm.wait(job, lambda: slurm.field(job, "Restarts") == "2")
    completed(slurm, job)
    assert slurm.field(job, "Restarts") == "2" and slurm.field(job, "ExcNodeList") == "n2"
    assert job.text.count("on n2 (killed by SIGKILL)") >= 2
    assert losses(job.run_dir) == undisturbed


@pytest.mark.slow
def test_a_chain_goes_on_where_requeue_is_forbidden(
    slurm: Cluster, demo_run: list[str], tmp_path: Path, undisturbed: list[float]
) -> None:
    job = slurm.submit(tmp_path, *demo_run, options=("--array=1-4%1", "--no-requeue"))
    slurm.wait(job, lambda: job.steps_done() >= 3)
    (job.run_dir / "stop").touch()  # as the signal before the time limit does
    slurm.wait_for_chain(job)
    assert "the run is finished" in job.text
    assert "the next job of the chain goes on" in job.text
    assert losses(job.run_dir) == undisturbed
    starts = (job.run_dir / "starts.jsonl").read_text()
    assert starts.count('"began"') == 2, "the rest of the chain had nothing to do"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_limit_that_slurm_itself_keeps(slurm: Cluster, demo_run: list[str], tmp_path: Path) -> None:
    """Slurm may signal a minute early, and so while the script reads the run file: a step a start is made all the same."""
    settings = (*demo_run, f"training.train_steps={STEPS_OF_SHORT_STARTS}")
    job = slurm.submit(tmp_path, *settings, options=("--time=2", "--signal=B:USR1@110"))
    assert slurm.end(job, 900) == "COMPLETED", job.text
    assert "asked to stop" in job.text and int(slurm.field(job, "Restarts")) >= 1
    alone = tmp_path / "alone"
    launch("megatron_nvlm.train", 2, "--config", RUN_FILE, f"run_dir={alone}", *settings)
    rows, undisturbed = read_metrics(job.run_dir), read_metrics(alone)
    assert [row["loss"] for row in rows] == [row["loss"] for row in undisturbed]
    assert len(rows) == STEPS_OF_SHORT_STARTS


@pytest.mark.slow
def test_a_lost_slurmd_changes_nothing(
    slurm: Cluster, demo_run: list[str], tmp_path: Path, undisturbed: list[float]
) -> None:
    job = slurm.submit(tmp_path, *demo_run)
    slurm.wait(job, lambda: job.steps_done() >= 3)
    batch_host = slurm.field(job, "BatchHost")
    lost = next(name for name in hosts(slurm, job) if name != batch_host)
    mini_slurm("kill-slurmd", lost)
    try:
        completed(slurm, job)
    finally:
        assert mini_slurm("start-node", lost).returncode == 0
    assert losses(job.run_dir) == undisturbed


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_one_start(
    slurm: Cluster, demo_run: list[str], tmp_path: Path, undisturbed: list[float]
) -> None:
    job = slurm.submit(tmp_path, *demo_run)
    slurm.wait(job, lambda: job.steps_done() >= 10)
    kill(job.ranks()[0])
    slurm.wait(job, lambda: not job.ranks())
    newest = damage_newest_checkpoint(job)
    completed(slurm, job)
    assert f"damaged ({newest}" in job.text and slurm.field(job, "Restarts") == "1"
    assert losses(job.run_dir) == undisturbed


@pytest.mark.slow
def test_runs_that_cannot_go_on_end_with_their_codes(slurm: Cluster, demo_run: list[str], tmp_path: Path) -> None:
    diverged = slurm.submit(tmp_path / "diverged", *demo_run, "optimizer.max_lr=1.0e+30", "optimizer.clip_grad=0")
    assert slurm.end(diverged) == "FAILED", diverged.text
    assert slurm.field(diverged, "ExitCode") == "4:0" and slurm.field(diverged, "Restarts") == "0"
    assert "the same start would fail again" in diverged.text

    (tmp_path / "sitecustomize.py").write_text(FAULTY_NODE.replace("== os.uname().nodename", "== 'all'"))
    path = f"{tmp_path}:{slurm.environment['PYTHONPATH']}"
    stuck = slurm.submit(tmp_path / "stuck", *demo_run, PYTHONPATH=path, FAULTY_NODE="all", MAX_FAILURES="9")
    assert slurm.end(stuck) == "FAILED", stuck.text
    assert slurm.field(stuck, "ExitCode") == "10:0", stuck.text


@pytest.mark.slow
def test_preflight_leaves_out_a_node_that_is_not_fit(
    slurm: Cluster, demo_run: list[str], tmp_path: Path, undisturbed: list[float]
) -> None:
    check = "bash -c '[ $(uname -n) != n2 ]'"
    job = slurm.submit(
        tmp_path, *demo_run, options=("--nodelist=n1",), script_options=("--preflight",), HEALTH_CHECK=check
    )
    completed(slurm, job)
    assert slurm.field(job, "Restarts") == "1" and slurm.field(job, "ExcNodeList") == "n2"
    assert "n2: `bash -c" in job.text and job.text.count("green: nothing to mend") >= 2
    assert losses(job.run_dir) == undisturbed
