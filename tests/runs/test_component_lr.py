"""Learning rates by component: what they are, what they change, and that they go through a resume in any layout."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import launch
from tests.support.shards import read_metrics, write_run

pytestmark = pytest.mark.distributed

TRAIN = "megatron_nvlm.train"
COMPONENTS = ("vision_model", "vision_projection", "cross_attention", "language_model")
OWN = "optimizer.component_lr={vision_projection: 2.0, cross_attention: 0.5}"
STEPS = 5


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates")
    return write_run(folder, training={"train_steps": STEPS, "micro_batch_size": 1}, optimizer={"decay_steps": 8})


def run(run_file: Path, name: str, *overrides: str, ranks: int = 1) -> tuple[list[dict[str, Any]], str]:
    """Metrics and what was printed."""
    folder = run_file.parent / name
    done = launch(TRAIN, ranks, "--config", str(run_file), f"run_dir={folder}", *overrides)
    return read_metrics(folder), done.stdout


@pytest.fixture(scope="module")
def plain(run_file: Path) -> list[dict[str, Any]]:
    """Without rates of components."""
    return run(run_file, "plain")[0]


@pytest.fixture(scope="module")
def own(run_file: Path) -> list[dict[str, Any]]:
    """With OWN, without an interruption."""
    return run(run_file, "own", OWN)[0]


def column(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row.get(name) for name in names) for row in rows]


def test_multiples_of_one_change_nothing(run_file: Path, plain: list[dict[str, Any]]) -> None:
    ones = ", ".join(f"{component}: 1.0" for component in COMPONENTS)
    rows, _ = run(run_file, "ones", f"optimizer.component_lr={{{ones}}}")
    names = ("loss", "grad_norm", "learning_rate", "gates", "learning_rates")
    assert column(rows, *names) == column(plain, *names) and "learning_rates" not in rows[0]


@pytest.mark.slow
def test_the_same_multiple_of_all_is_another_rate(run_file: Path, plain: list[dict[str, Any]]) -> None:
    twos = ", ".join(f"{component}: 2" for component in COMPONENTS)
    rows, _ = run(run_file, "twos", f"optimizer.component_lr={{{twos}}}")
    double, _ = run(run_file, "double", "optimizer.max_lr=2e-3", "optimizer.min_lr=2e-4")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in double], rel=1e-6)
    assert [row["learning_rate"] for row in rows] == [row["learning_rate"] for row in plain]
    assert rows[-1]["loss"] != pytest.approx(plain[-1]["loss"], rel=1e-6)


def test_rates_of_components_are_written_down(own: list[dict[str, Any]], plain: list[dict[str, Any]]) -> None:
    assert column(own, "learning_rate") == column(plain, "learning_rate")
    for row in own:
        rate = row["learning_rate"]
        assert row["learning_rates"] == pytest.approx({"vision_projection": 2 * rate, "cross_attention": rate / 2})
    assert own[0]["loss"] == plain[0]["loss"] and own[-1]["loss"] != pytest.approx(plain[-1]["loss"], rel=1e-6)


@pytest.mark.parametrize("distributed", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_another_layout_goes_on_with_them(run_file: Path, own: list[dict[str, Any]], distributed: str) -> None:
    """Saved by two pipeline stages, loaded by two replicas; the last stage has no vision components."""
    name, key = f"layouts-{distributed}", f"parallelism.use_distributed_optimizer={distributed}"
    run(run_file, name, OWN, key, "parallelism.pipeline_model_parallel_size=2", "training.train_steps=3", ranks=2)
    rows, printed = run(run_file, name, OWN, key, ranks=2)
    assert "resuming from step 3" in printed and len(rows) == STEPS
    assert column(rows, "learning_rate", "learning_rates") == column(own, "learning_rate", "learning_rates")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in own], rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in own], rel=1e-4)


@pytest.mark.slow
def test_changed_multiples_take_effect(run_file: Path, plain: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """From none to some to others to none, and kept with the schedule."""
    run(run_file, "changed", "training.train_steps=2")
    _, printed = run(run_file, "changed", OWN, "training.train_steps=3")
    listed = '{} -> {"cross_attention": 0.5, "vision_projection": 2.0}'
    assert f"changed since the checkpoint: optimizer.component_lr: {listed}" in printed
    three = "optimizer.component_lr={vision_projection: 3.0}"
    keep = "checkpoint.keep_schedule=true"
    rows, printed = run(run_file, "changed", three, keep, "training.train_steps=4")
    assert "(kept at the old value by checkpoint.keep_schedule)" in printed
    assert rows[3]["learning_rates"] == own[3]["learning_rates"]
    stored = (run_file.parent / "changed" / "config.yaml").read_text()
    assert "cross_attention: 0.5" in stored and "vision_projection: 2.0" in stored
    rows, _ = run(run_file, "changed", three, "training.train_steps=5")
    assert rows[4]["learning_rates"] == pytest.approx({"vision_projection": 3 * rows[4]["learning_rate"]})
    rows, _ = run(run_file, "changed", "training.train_steps=6")
    assert column(rows[:5], "learning_rate") == column(plain, "learning_rate") and "learning_rates" not in rows[5]
    assert rows[2]["loss"] == plain[2]["loss"] and rows[3]["loss"] != plain[3]["loss"]


@pytest.mark.slow
def test_a_stage_without_parameters_of_a_group(run_file: Path) -> None:
    """In bf16 without the distributed optimizer the first stage's list of main weights is empty for cross-attention."""
    keys = [
        *("training.precision=bf16", "parallelism.use_distributed_optimizer=false", "model.cross_attention.interval=4"),
        *("parallelism.pipeline_model_parallel_size=2", "optimizer.component_lr={cross_attention: 2.0}"),
    ]
    whole, _ = run(run_file, "stages", *keys, ranks=2)
    run(run_file, "in-two", *keys, "training.train_steps=3", ranks=2)
    rows, printed = run(run_file, "in-two", *keys, ranks=2)
    assert "resuming from step 3" in printed and column(rows, "loss", "grad_norm") == column(whole, "loss", "grad_norm")
    rows, printed = run(run_file, "in-two", *keys[:-2], "training.train_steps=6")
    assert "resuming from step 5" in printed and len(rows) == 6
