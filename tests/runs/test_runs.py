"""Whole runs by the real command: repeated, interrupted and resumed, continued from weights, refused."""

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_nvlm.checkpoint.save_load import LATEST_FILE
from tests.support.launch import command, environment, launch, start
from tests.support.shards import good_samples, read_metrics, write_run, write_samples

pytestmark = pytest.mark.distributed

TRAIN = "megatron_nvlm.train"
TENSOR_PARALLEL = "parallelism.tensor_model_parallel_size=2"
STEPS = 12


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), training={"train_steps": STEPS})


@pytest.fixture(scope="module")
def uninterrupted(run_file: Path) -> Path:
    """A run of two tensor-parallel ranks from beginning to end."""
    run_dir = run_file.parent / "uninterrupted"
    launch(TRAIN, 2, "--config", str(run_file), f"run_dir={run_dir}", TENSOR_PARALLEL)
    assert len(losses(run_dir)) == STEPS
    return run_dir


def test_one_seed_gives_the_same_numbers_digit_for_digit(run_file: Path, uninterrupted: Path) -> None:
    again = run_file.parent / "again"
    launch(TRAIN, 2, "--config", str(run_file), f"run_dir={again}", TENSOR_PARALLEL)
    assert losses(again) == losses(uninterrupted)
    assert losses(again)[-1][1] < losses(again)[0][1]


HOW = {
    "SIGINT": lambda launcher, ranks, run_dir: launcher.send_signal(signal.SIGINT),
    "SIGTERM": lambda launcher, ranks, run_dir: launcher.send_signal(signal.SIGTERM),
    "launcher killed": lambda launcher, ranks, run_dir: launcher.kill(),
    "everything killed": lambda launcher, ranks, run_dir: [process.kill() for process in [launcher, *ranks]],
    "stop file": lambda launcher, ranks, run_dir: (run_dir / "stop").touch(),
}


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=[] if how in ("SIGTERM", "launcher killed") else pytest.mark.slow) for how in HOW],
)
def test_an_interrupted_run_ends_as_if_nothing_had_been(
    run_file: Path, uninterrupted: Path, tmp_path: Path, how: str
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--config", str(run_file), f"run_dir={run_dir}", TENSOR_PARALLEL]
    process = start(TRAIN, 2, *arguments, log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not _has_steps(run_dir, 5):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    ranks = psutil.Process(process.pid).children(recursive=True)
    HOW[how](process, ranks, run_dir)
    process.wait(timeout=120)
    psutil.wait_procs(ranks, timeout=120)  # a rank ends with its launcher, by itself
    reached = len(losses_of_complete_lines(run_dir))
    assert 5 <= reached < STEPS, "it was interrupted too late to prove anything"
    latest = int((run_dir / "checkpoints" / LATEST_FILE).read_text().removeprefix("step_"))
    if how != "everything killed":
        assert latest == reached, "a run that is asked to stop saves where it is"
    done = launch(TRAIN, 2, *arguments)
    assert f"resuming from step {latest}" in done.stdout
    assert losses(run_dir) == losses(uninterrupted)
    assert (run_dir / "finished").exists()


def _has_steps(run_dir: Path, count: int) -> bool:
    return (run_dir / "metrics.jsonl").exists() and len(losses_of_complete_lines(run_dir)) >= count


def losses_of_complete_lines(run_dir: Path) -> list[str]:
    return [line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, []),
        (2, []),  # data parallel
        pytest.param(2, ["parallelism.pipeline_model_parallel_size=2"], marks=pytest.mark.slow),
        pytest.param(2, [TENSOR_PARALLEL, "parallelism.sequence_parallel=true"], marks=pytest.mark.slow),
    ],
)
def test_layouts_agree_on_the_losses_of_a_run(
    run_file: Path, uninterrupted: Path, tmp_path: Path, ranks: int, layout: list[str]
) -> None:
    """float32, with updates by the distributed optimizer."""
    launch(TRAIN, ranks, "--config", str(run_file), f"run_dir={tmp_path}", *layout)
    for (step, loss, _), (_, expected, _) in zip(losses(tmp_path), losses(uninterrupted), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5), f"step {step}"


@pytest.mark.slow
def test_another_layout_goes_on_from_the_checkpoint(run_file: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    base = ["--config", str(run_file), f"run_dir={run_dir}"]
    stop = launch(TRAIN, 2, *base, TENSOR_PARALLEL, "training.train_steps=6", "optimizer.decay_steps=12")
    assert "finished after step 6" in stop.stdout
    launch(TRAIN, 2, *base, "parallelism.pipeline_model_parallel_size=2")
    for (_, loss, _), (_, expected, _) in zip(losses(run_dir), losses(uninterrupted), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)


def test_fine_tuning_starts_with_the_weights_of_pretraining(
    run_file: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "sft"
    done = launch(
        TRAIN,
        2,
        "--config",
        str(run_file),
        f"run_dir={run_dir}",
        f"checkpoint.initial_weights={uninterrupted}",
        TENSOR_PARALLEL,
    )
    assert f"starting with the weights of {uninterrupted}" in done.stdout
    assert losses(run_dir)[0][1] < losses(uninterrupted)[0][1] - 0.2


def test_only_what_the_recipe_names_trains(run_file: Path, tmp_path: Path) -> None:
    """Pretraining over two pipeline stages: the later one has only cross-attention to train."""
    run_dir = tmp_path / "pretrain"
    done = launch(
        TRAIN,
        2,
        "--config",
        str(run_file),
        f"run_dir={run_dir}",
        "recipe={name: pretrain, trainable: null}",
        "training.train_steps=3",
        "parallelism.pipeline_model_parallel_size=2",
    )
    assert len(losses(run_dir)) == 3
    for line in ("stage 1 of 2: vision_model", "stage 2 of 2: language_model"):
        assert any(said.startswith(line) and said.endswith("frozen") for said in done.stdout.splitlines()), done.stdout
    assert "stage 2 of 2: cross_attention" in done.stdout


@pytest.mark.slow
def test_projector_alone_trains_in_a_pipeline_whose_later_stage_has_nothing(run_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "pretrain_d"
    arguments = [
        "--config",
        str(run_file),
        f"run_dir={run_dir}",
        "model.variant=d",
        "recipe={name: pretrain, trainable: null}",
        "parallelism.pipeline_model_parallel_size=2",
        "optimizer.decay_steps=12",
    ]
    launch(TRAIN, 2, *arguments, "training.train_steps=3")
    assert "resuming from step 3" in launch(TRAIN, 2, *arguments, "training.train_steps=4").stdout
    rows = losses(run_dir)
    assert len(rows) == 4 and rows[-1][2] > 0


def test_a_checkpoint_of_another_variant_is_refused(run_file: Path, uninterrupted: Path) -> None:
    before = sorted(uninterrupted.rglob("*"))
    done = launch(
        TRAIN, 1, "--config", str(run_file), f"run_dir={uninterrupted}", "model.variant=x", TENSOR_PARALLEL, check=False
    )
    assert done.returncode != 0
    done = launch(
        TRAIN, 2, "--config", str(run_file), f"run_dir={uninterrupted}", "model.variant=x", TENSOR_PARALLEL, check=False
    )
    assert done.returncode != 0
    assert "is of NVLM 'h' and this run is of 'x'; set model.variant=h or choose another run_dir" in done.stderr
    assert "Traceback" not in done.stderr.split("error: ")[0]
    assert sorted(uninterrupted.rglob("*")) == before


def test_a_broken_set_stops_every_rank_before_work(run_file: Path, tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "shards", good_samples(20))
    (folder / "shard-000001.tar").unlink()
    path = write_run(tmp_path / "run", train=folder)
    done = launch(TRAIN, 2, "--config", str(path), TENSOR_PARALLEL, check=False)
    assert done.returncode != 0
    assert "shard-000001.tar is missing; copy or build it again" in done.stderr
    assert not (tmp_path / "run" / "run").exists()


@pytest.mark.slow
def test_a_full_disk_fails_every_rank_and_spares_what_was_saved(run_file: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the operating system refuses to write on."""
    run_dir = tmp_path / "run"
    base = ["--config", str(run_file), f"run_dir={run_dir}", TENSOR_PARALLEL]
    launch(TRAIN, 2, *base, "training.train_steps=2", "optimizer.decay_steps=12", "optimizer.warmup_steps=2")
    limited = ["bash", "-c", 'ulimit -f 300; exec "$@"', "limited", *command(TRAIN, 2, *base)]
    done = subprocess.run(limited, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "could not be saved (rank" in done.stderr, done.stderr
    assert "goes on from its last complete checkpoint" in done.stderr
    assert (run_dir / "checkpoints" / LATEST_FILE).read_text() == "step_00000002"
    assert [path.name for path in (run_dir / "checkpoints").glob("*step*")] == ["step_00000002"]
    launch(TRAIN, 2, *base)
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS
