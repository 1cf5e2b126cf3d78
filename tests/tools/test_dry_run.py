"""The dry run as a user starts it: paper-sized runs, suggestions, refusals, and every command of docs/performance.md."""

import json
import re
import resource
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.models.test_paper_sizes import INTERNVIT_6B, LANGUAGE
from tests.support.launch import REPOSITORY, environment
from tools.dry_run import main

DOCUMENT = REPOSITORY / "docs" / "performance.md"
COMMANDS = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("python -m tools.dry_run ")]
TABLE_3 = {
    variant: next(c for c in COMMANDS if f"sft_nvlm_{variant}_34b" in c and "--measured" in c) for variant in "xhd"
}
PAPER_RUNS = sorted((REPOSITORY / "configs").glob("*_nvlm_*.yaml"))


@cache
def run(command: str) -> subprocess.CompletedProcess[str]:
    """A command line of the documentation, in a process of its own."""
    arguments = [sys.executable, *shlex.split(command)[1:]]
    return subprocess.run(arguments, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=180)


def dry_run(config: str, world_size: int, *arguments: str) -> dict:  # type: ignore[type-arg]
    options = ["--config", f"configs/{config}.yaml", "--world-size", str(world_size), "--json", *arguments]
    done = run(shlex.join(["python", "-m", "tools.dry_run", *options]))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_pipeline_of_the_72b_model_on_1024_ranks() -> None:
    result = dry_run("sft_nvlm_x_72b", 1024, "parallelism.pipeline_model_parallel_size=4")
    assert result["ownership_problems"] == []
    assert result["ranks_built"] == 32
    language, width, _, kv_width = LANGUAGE["72b"]
    cross_attention = 10 * (2 * width**2 + 2 * width * kv_width + width + 1)
    assert result["parameters"] == {
        "language_model": language,
        "cross_attention": cross_attention,
        "vision_model": INTERNVIT_6B,
        "vision_projection": 12800 * width,
    }
    stages = result["stages"]
    assert [stage["layers"] for stage in stages] == [list(range(20 * n, 20 * n + 20)) for n in range(4)]
    assert [stage["cross_attention_layers"] for stage in stages] == [[7, 15], [23, 31, 39], [47, 55], [63, 71, 79]]
    # Between stages: 1024 decoder rows and 7 x 256 context rows of 8192 bf16 numbers, a shard of 8 each.
    assert [stage["payload_bytes"] for stage in stages] == [(1024 + 1792) // 8 * 8192 * 2] * 3 + [0]
    assert [stage["has_encoder"] for stage in stages] == [True, False, False, False]
    assert result["bubble"] == pytest.approx(3 / (result["world_size"] and 256 / 32 + 3))
    assert result["fits"]


def test_a_frozen_language_model_has_no_gradients() -> None:
    (stage,) = dry_run("pretrain_nvlm_d_34b", 128)["stages"]
    # The projector alone trains: LayerNorm whole, both layers in 8 parts; float32 gradients, 12 bytes of state in 16 shards.
    trains = 2 * 12800 + (12800 * 20480 + 20480 * 7168) // 8
    assert stage["trainable_parameters"] == trains
    assert stage["state"]["gradients"] == pytest.approx(4 * trains, rel=1e-4)
    assert stage["state"]["optimizer"] == pytest.approx(12 * trains / 16, rel=1e-4)
    assert stage["state"]["weights"] == pytest.approx(2 * stage["parameters"], rel=1e-4)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documentation(command: str) -> None:
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    if "--suggest" not in command:
        assert "each is owned exactly once per replica" in done.stdout


def test_figures_of_the_documentation() -> None:
    rows = {line.split("|")[1].strip().lower(): line for line in DOCUMENT.read_text().splitlines() if "%" in line}
    predicted = {}
    for variant, command in TABLE_3.items():
        printed = run(command).stdout
        rate = re.search(r"([\d.]+) samples/s, MFU", printed)
        measured = re.search(r"MFU ([\d.]+%) \(([\d.]+%) with recompute full", printed)
        assert rate and measured
        predicted[variant] = float(rate[1])
        cells = [cell.strip() for cell in rows[variant].split("|")]
        assert {rate[1], measured[1], measured[2]} <= set(cells), cells
    assert predicted["x"] > predicted["h"] > predicted["d"], "the order of the paper's Table 3"


def test_suggestions_fit_and_the_fastest_comes_first() -> None:
    runs = dry_run("sft_nvlm_d_72b", 64, "--suggest")
    assert len(runs) > 3
    rates = [one["samples_per_second"] for one in runs]  # type: ignore[index]
    assert rates == sorted(rates, reverse=True)
    assert all(one["fits"] for one in runs)  # type: ignore[index]
    assert len({json.dumps([one["parallelism"], one["recompute"]]) for one in runs}) == len(runs)  # type: ignore[index]


def test_a_run_that_does_not_fit() -> None:
    done = run("python -m tools.dry_run --config configs/sft_nvlm_h_72b.yaml --world-size 128 --gpu-memory-gib 24")
    assert done.returncode == 1
    assert "DOES NOT FIT" in done.stdout


REFUSED = {
    "tensor_model_parallel_size=3": "does not divide",
    "pipeline_model_parallel_size=7": "ranks cannot be divided",
    "pipeline_model_parallel_size=64": "ranks cannot be divided",
    "vision_placement=nowhere": "vision_placement",
    "tensor_model_parallel_sise=4": "did you mean parallelism.tensor_model_parallel_size",
}


@pytest.mark.parametrize("override", REFUSED)
def test_bad_layouts_are_refused_with_a_sentence(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(REPOSITORY / "configs" / "sft_nvlm_h_34b.yaml")
    assert main(["--config", config, "--world-size", "128", f"parallelism.{override}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert REFUSED[override] in printed


def test_an_image_that_leaves_no_text() -> None:
    done = run(
        "python -m tools.dry_run --config configs/sft_nvlm_d_34b.yaml --world-size 128 data.sequence_length=1500"
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "lower tiling.max_tiles or raise data.sequence_length" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [128, 1024])
@pytest.mark.parametrize("path", PAPER_RUNS, ids=lambda path: path.stem)
def test_every_run_of_the_paper(path: Path, world_size: int) -> None:
    result = dry_run(path.stem, world_size)  # a process of its own, ended after three minutes
    assert result["ownership_problems"] == []
    assert result["fits"]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 8 * 2**20  # KiB, of the largest process so far
