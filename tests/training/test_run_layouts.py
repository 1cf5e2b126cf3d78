"""Layouts by the real command: virtual stages, both placements of the encoder, and a checkpoint that passes between them."""

from pathlib import Path

import pytest

from tests.support.launch import launch
from tests.support.shards import read_metrics, write_run

pytestmark = pytest.mark.distributed

TRAIN = "megatron_nvlm.train"
STEPS = 6
VIRTUAL = ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"]


def keys(*parallelism: str) -> list[str]:
    return [f"parallelism.{key}" for key in parallelism]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The run file, and its losses on one rank."""
    path = write_run(tmp_path_factory.mktemp("run"), training={"train_steps": STEPS})
    run_dir = path.parent / "one_rank"
    launch(TRAIN, 1, "--config", str(path), f"run_dir={run_dir}")
    return path, [row["loss"] for row in read_metrics(run_dir)]


def test_a_checkpoint_passes_between_chunks_and_placements(one_rank: tuple[Path, list[float]], tmp_path: Path) -> None:
    path, losses = one_rank
    base = ["--config", str(path), f"run_dir={tmp_path}", f"optimizer.decay_steps={STEPS}"]
    virtual = keys(*VIRTUAL, "payload_vision_tokens=400", "vision_placement=replicated", "vision_tiles_at_once=3")
    launch(TRAIN, 2, *base, *virtual, "training.train_steps=3")
    done = launch(TRAIN, 2, *base, *keys("tensor_model_parallel_size=2", "vision_placement=tensor_parallel"))
    assert "going on from step 3" in done.stdout
    rows = read_metrics(tmp_path)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    for row in rows[:3]:  # every tile on one of two ranks
        assert row["tiles_per_rank"] * 2 == row["tiles"]
        assert row["tile_imbalance"] <= (row["tiles_per_rank"] + 0.5) / row["tiles_per_rank"] + 1e-9
        assert row["vision_seconds"] > 0
    for row in rows[3:]:  # every tile on both
        assert row["tiles_per_rank"] == row["tiles"]
        assert row["tile_imbalance"] == 1
