"""What a real run writes of its steps: the same operations in every layout; profiles of the steps and ranks asked for."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.launch import launch
from tests.support.loaders import counted_samples
from tests.support.shards import good_samples, read_metrics, write_run
from tests.support.tiny import VISION

pytestmark = pytest.mark.distributed

TRAIN = "megatron_nvlm.train"
COUNTED = ("flops", "model_flops", "vision_share", "real_tokens", "tiles", "samples")
LAYOUTS = {
    "TP2 with SP": ("tensor_model_parallel_size=2", "sequence_parallel=true"),
    "PP2": ("pipeline_model_parallel_size=2",),
    "DP2": (),
    "TP2, tiles of the step shared": ("tensor_model_parallel_size=2", "vision_placement=replicated"),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The run file of a packed run with full recompute whose encoder trains, and its steps on one rank."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = qwen2_tokenizer(1024)
    tokenizer.save(str(folder / "tokenizer.json"))
    counted_samples(folder / "shards", good_samples(24), Tokenizer(tokenizer))
    path = write_run(
        folder,
        folder / "shards",
        model={"recompute": "full"},
        data={"packing": {"enabled": True, "window_samples": 8}, "system": None},
        training={"train_steps": 3, "micro_batch_size": 1, "global_batch_size": 4},
        logging={"peak_tflops": 0.5, "log_every_steps": 1, "tensorboard": False},
    )
    done = launch(TRAIN, 1, "--config", str(path))
    assert "MFU is a share of 0.5 TFLOP/s a rank (logging.peak_tflops, a CPU)" in done.stdout
    assert "TFLOP/s a rank  MFU " in next(line for line in done.stdout.splitlines() if line.startswith("step 1/"))
    return path, read_metrics(path.parent / "run")


def check_rates(row: dict[str, Any], ranks: int) -> None:
    """Rates and shares follow from the counts and the time of the step."""
    assert row["model_flops"] == sum(row["flops"].values()) > 0
    assert row["tflops_per_rank"] == pytest.approx(row["model_flops"] / row["seconds"] / ranks / 1e12)
    assert row["mfu"] == pytest.approx(row["tflops_per_rank"] / 0.5)
    assert row["hfu"] / row["mfu"] == pytest.approx(row["hardware_flops"] / row["model_flops"])
    for name, count in (("samples", "samples"), ("tiles", "tiles"), ("tokens", "real_tokens")):
        assert row[f"{name}_per_second_per_rank"] == pytest.approx(row[count] / row["seconds"] / ranks)
    assert row["vision_share"] == row["flops"]["vision_model"] / row["model_flops"]
    assert 0 <= row["data_wait_share"] <= 1 and row["data_wait_seconds"] > 0
    assert row["peak_memory_of"] == "process" and 0.05 < row["peak_memory_gib"] < 100


def test_one_process_counts_its_steps(packed: tuple[Path, list[dict[str, Any]]]) -> None:
    for row in packed[1]:
        check_rates(row, 1)
        assert row["hardware_flops"] > 1.2 * row["model_flops"]  # each decoder layer is run forward twice
        assert row["real_tokens"] == row["tokens"] and 0 <= row["padding_share"] < 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_counts_the_same_operations(
    packed: tuple[Path, list[dict[str, Any]]], tmp_path: Path, layout: str
) -> None:
    path, expected = packed
    overrides = [f"parallelism.{key}" for key in LAYOUTS[layout]]
    launch(TRAIN, 2, "--config", str(path), f"run_dir={tmp_path}", *overrides)
    for row, alone in zip(read_metrics(tmp_path), expected, strict=True):
        assert {name: row[name] for name in COUNTED} == {name: alone[name] for name in COUNTED}
        check_rates(row, 2)
        if "shared" in layout:  # an encoder that trains encodes its tiles again in the backward pass
            again = row["hardware_flops"] - alone["hardware_flops"]
            # Forward, gradients of inputs and of weights are alike, but pixels have no gradient.
            patches = row["tiles"] * VISION.patches_per_tile
            convolution = 2 * patches * 3 * VISION.patch_size**2 * VISION.hidden_size
            assert 3 * again == row["flops"]["vision_model"] + convolution
        else:
            assert row["hardware_flops"] == alone["hardware_flops"]
        assert row["padding_share"] >= alone["padding_share"]
        assert row["tokens"] >= row["real_tokens"]


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in RunDir(run_dir).profile.glob("*"))


@pytest.mark.slow
def test_profiles_of_steps_and_ranks(tmp_path: Path) -> None:
    """A stretch that an interruption cuts in two is profiled in two; what is computed stays the same digit for digit."""
    path = write_run(tmp_path / "files", training={"train_steps": 5}, optimizer={"decay_steps": 5})
    base = ["--config", str(path), "parallelism.pipeline_model_parallel_size=2"]
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    launch(TRAIN, 2, *base, f"run_dir={plain}")
    asked = [*base, f"run_dir={profiled}", "training.profile=2-4", "training.profile_ranks=[1]"]
    launch(TRAIN, 2, *asked, "training.train_steps=3")
    assert names(profiled) == ["steps_2-3_rank_00001.json.gz", "steps_2-3_rank_00001.txt"]
    done = launch(TRAIN, 2, *asked)
    assert "resuming from step 3" in done.stdout
    assert names(profiled)[2:] == ["steps_4_rank_00001.json.gz", "steps_4_rank_00001.txt"]
    assert names(plain) == []
    for key in ("loss", "grad_norm", "model_flops", "real_tokens"):
        assert [row[key] for row in read_metrics(profiled)] == [row[key] for row in read_metrics(plain)]

    folder = RunDir(profiled).profile
    table = (folder / "steps_2-3_rank_00001.txt").read_text().splitlines()
    assert table[0].startswith("where the time went: steps 2-3 of rank 1, ")
    parts = ("data", "forward", "backward", "messages", "gradients", "optimizer", "metrics", "save", "everything else")
    rows = {part: next(line for line in table if line.startswith(f"{part} ")) for part in parts}
    shares = [float(row.split()[-1].removesuffix("%")) for row in rows.values()]
    assert sum(shares) == pytest.approx(100, abs=1) and min(shares) >= 0
    assert any(line.startswith("aten::mm ") for line in table)
    trace = json.loads(gzip.decompress((folder / "steps_2-3_rank_00001.json.gz").read_bytes()))
    marks = [event["name"] for event in trace["traceEvents"] if str(event.get("name", "")).startswith("step/")]
    assert {f"step/{part}" for part in parts[:-1]} <= set(marks)
    assert marks.count("step/forward") == marks.count("step/backward") == 4  # two micro-batches of two steps
    assert marks.count("step/optimizer") == 2
