"""Layouts by the real command: virtual stages, both placements of the encoder, and a checkpoint that passes between them."""

from pathlib import Path

import pytest

from megatron_nvlm.image.tiling import Grid
from megatron_nvlm.runs.run_dir import RunDir
from tests.support.launch import launch
from tests.support.shards import cut_sample, good_samples, picture, read_metrics, record, write_run, write_samples

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
    assert "resuming from step 3" in done.stdout
    rows = read_metrics(tmp_path)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    for row in rows[:3]:  # every tile on one of two ranks
        assert row["tiles_per_rank"] * 2 == row["tiles"]
        assert row["tile_imbalance"] <= (row["tiles_per_rank"] + 0.5) / row["tiles_per_rank"] + 1e-9
        assert row["vision_seconds"] > 0
    for row in rows[3:]:  # every tile on both
        assert row["tiles_per_rank"] == row["tiles"]
        assert row["tile_imbalance"] == 1


@pytest.mark.slow
def test_a_checkpoint_with_tied_embeddings_passes_between_pipelines(tmp_path: Path) -> None:
    """Of Qwen3's form: its one embedding stands on both stages of a pipeline, and once in a checkpoint."""
    path = write_run(tmp_path / "run", model={"language": "tiny_qwen3"}, training={"train_steps": STEPS})
    base = ["--config", str(path), f"optimizer.decay_steps={STEPS}", *keys("use_distributed_optimizer=false")]
    whole, passed = tmp_path / "whole", tmp_path / "passed"
    launch(TRAIN, 1, *base, f"run_dir={whole}")
    launch(TRAIN, 2, *base, f"run_dir={passed}", *keys("pipeline_model_parallel_size=2"), "training.train_steps=2")
    launch(TRAIN, 2, *base, f"run_dir={passed}", *keys("tensor_model_parallel_size=2"), "training.train_steps=4")
    launch(TRAIN, 2, *base, f"run_dir={passed}", *keys("pipeline_model_parallel_size=2"))
    losses = [[row["loss"] for row in read_metrics(run_dir)] for run_dir in (whole, passed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_ranks_that_share_tiles_agree_on_broken_images(tmp_path: Path) -> None:
    """Each is decoded by one rank, or by two; all drop it, and write down what one process does."""
    samples = good_samples(24)
    for number in (1, 2, 9, 10, 17):
        samples[number] = (record("?", "half"), {"0.jpg": picture(168, 112, "JPEG", seed=number)[:2000]})
    cut, pictures = cut_sample(Grid(3, 2))
    samples[12] = (cut, {name: data[:300] if "tile_5" in name else data for name, data in pictures.items()})
    train = write_samples(tmp_path / "shards", samples)
    path = write_run(tmp_path / "run", train, training={"train_steps": STEPS}, data={"max_bad_fraction": 0.5})
    base = ["--config", str(path)]
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    launch(TRAIN, 1, *base, f"run_dir={whole}")
    layout = keys("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "vision_placement=replicated")
    launch(TRAIN, 4, *base, f"run_dir={shared}", *layout, "data.num_workers=1")
    expected, got = read_metrics(whole), read_metrics(shared)
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    for key in ("samples", "tiles", "tokens", "bad_samples", "bad"):
        assert [row[key] for row in got] == [row[key] for row in expected], key
    assert sum(row["bad_samples"] for row in got) >= 6
    assert RunDir(shared).quarantine.read_text() == RunDir(whole).quarantine.read_text()
