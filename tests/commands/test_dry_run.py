"""The dry run as a user starts it: paper-sized runs, suggestions, refusals, and every command of docs/performance.md."""

import contextlib
import io
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.commands.dry_run import main
from megatron_nvlm.ops.linear_cross_entropy import CHUNK_ELEMENTS
from tests.models.test_paper_sizes import INTERNVIT_6B, LANGUAGE
from tests.support.launch import REPOSITORY, environment
from tests.support.ranks import run_ranks

DOCUMENT = REPOSITORY / "docs" / "performance.md"
COMMANDS = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("python -m tools.dry_run ")]
TABLE_3 = {
    variant: next(c for c in COMMANDS if f"sft_nvlm_{variant}_34b" in c and "--measured" in c) for variant in "xhd"
}
PAPER_RUNS = sorted((REPOSITORY / "configs").glob("*_nvlm_*.yaml"))


X_IN_FOUR_STAGES = "python -m tools.dry_run --json --config configs/sft_nvlm_x_72b.yaml --world-size 1024 " + (
    "parallelism.pipeline_model_parallel_size=4"
)
D_PRETRAINING = "python -m tools.dry_run --json --config configs/pretrain_nvlm_d_34b.yaml --world-size 128"
SUGGESTIONS = "python -m tools.dry_run --json --suggest --config configs/sft_nvlm_d_72b.yaml --world-size 64"
NO_TEXT = "python -m tools.dry_run --config configs/sft_nvlm_d_34b.yaml --world-size 128 data.sequence_length=1500"
SHORT_MESSAGES = "python -m tools.dry_run --config configs/sft_nvlm_h_72b.yaml --world-size 128 " + (
    "parallelism.pipeline_model_parallel_size=2 parallelism.virtual_pipeline_model_parallel_size=2 "
    "parallelism.payload_vision_tokens=100"
)

TIED = "python -m tools.dry_run --json --config configs/demo_d.yaml --world-size 2 model.language=qwen2_0.5b " + (
    "parallelism.tensor_model_parallel_size=1 parallelism.pipeline_model_parallel_size=2 "
    "parallelism.use_distributed_optimizer=false"
)

ADAPTERS = "python -m tools.dry_run --json --config configs/demo_h.yaml --world-size 4 model.lora.rank=16 " + (
    "recipe.trainable=null parallelism.pipeline_model_parallel_size=2"
)


@dataclass(frozen=True)
class Printed:
    status: int | None
    out: str
    err: str


def run_all(commands: list[str]) -> dict[str, Printed]:
    """One process for all commands: it must be in no process group, and starting one takes longer than a dry run."""
    os.chdir(REPOSITORY)
    results = {}
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(shlex.split(command)[3:])
            except SystemExit as end:
                status = end.code  # type: ignore[assignment]
        results[command] = Printed(status, out.getvalue(), err.getvalue())
    return results


@pytest.fixture(scope="module")
def printed() -> dict[str, Printed]:
    others = [X_IN_FOUR_STAGES, D_PRETRAINING, SUGGESTIONS, NO_TEXT, SHORT_MESSAGES, TIED, ADAPTERS]
    return run_ranks(1, run_all, COMMANDS + others)[0]  # type: ignore[no-any-return]


def numbers(result: Printed) -> Any:
    assert result.status == 0, result
    return json.loads(result.out)


def test_a_pipeline_of_the_72b_model_on_1024_ranks(printed: dict[str, Printed]) -> None:
    result = numbers(printed[X_IN_FOUR_STAGES])
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
    # Between stages: 1024 decoder tokens and 7 x 256 context tokens of 8192 bf16 numbers, a shard of 8 each.
    assert [stage["payload_bytes"] for stage in stages] == [(1024 + 1792) // 8 * 8192 * 2] * 3 + [0]
    assert [stage["has_encoder"] for stage in stages] == [True, False, False, False]
    assert result["bubble"] == pytest.approx(3 / (256 / 32 + 3))
    assert result["fits"]


def test_the_output_layer_counts_where_it_is_the_embedding(printed: dict[str, Printed]) -> None:
    """The last stage has a chunk of the logits with its gradient, never those of every token in float32."""
    result = numbers(printed[TIED])
    logits = 4 * 151936 * result["work_per_micro_batch"]["num_tokens"]
    first, last = result["stages"]
    assert first["working"] < 2 * 2 * CHUNK_ELEMENTS < last["working"] < logits


def test_adapters_are_owned_and_train(printed: dict[str, Printed]) -> None:
    """Two tensor-parallel ranks of two stages; the language model has no gradients, its adapters have."""
    told = json.loads(printed[ADAPTERS].out)
    assert told["ownership_problems"] == [] and told["parameters"]["lora"] == 149_504
    for stage in told["stages"]:
        assert 149_504 / 4 < stage["trainable_parameters"] < stage["parameters"] / 2


def test_a_frozen_language_model_has_no_gradients(printed: dict[str, Printed]) -> None:
    (stage,) = numbers(printed[D_PRETRAINING])["stages"]
    # The projector alone trains: LayerNorm whole, both layers in 8 parts; float32 gradients, 12 bytes of state in 16 shards.
    trains = 2 * 12800 + (12800 * 20480 + 20480 * 7168) // 8
    assert stage["trainable_parameters"] == trains
    assert stage["state"]["gradients"] == pytest.approx(4 * trains, rel=1e-4)
    assert stage["state"]["optimizer"] == pytest.approx(12 * trains / 16, rel=1e-4)
    assert stage["state"]["weights"] == pytest.approx(2 * stage["parameters"], rel=1e-4)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documentation(command: str, printed: dict[str, Printed]) -> None:
    assert not printed[command].status, printed[command]
    if "--suggest" not in command:
        assert "each is owned exactly once per replica" in printed[command].out


def test_figures_of_the_documentation(printed: dict[str, Printed]) -> None:
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|") and "%" in line]
    rows = {line.split("|")[1].strip().lower(): line for line in lines}
    predicted = {}
    for variant, command in TABLE_3.items():
        rate = re.search(r"([\d.]+) samples/s \(([\d.]+) a GPU\), MFU", printed[command].out)
        measured = re.search(r"MFU ([\d.]+%) \(([\d.]+%) with recompute full", printed[command].out)
        bound = re.search(r"bound by (\w+, \d+%) of a step", printed[command].out)
        assert rate and measured and bound
        predicted[variant] = float(rate[1])
        cells = [cell.strip() for cell in rows[variant].split("|")]
        assert {rate[1], rate[2], measured[1], measured[2], bound[1]} <= set(cells), cells
    assert predicted["x"] > predicted["h"] > predicted["d"], "the order of the paper's Table 3"


def test_suggestions_fit_and_the_fastest_comes_first(printed: dict[str, Printed]) -> None:
    runs = numbers(printed[SUGGESTIONS])
    assert len(runs) > 3
    rates = [one["samples_per_second"] for one in runs]
    assert rates == sorted(rates, reverse=True)
    assert all(one["fits"] for one in runs)
    assert len({json.dumps([one["parallelism"], one["recompute"]]) for one in runs}) == len(runs)


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_nvlm.commands.dry_run", *arguments]
    return subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=600)


def test_a_run_that_does_not_fit() -> None:
    done = start("--config", "configs/sft_nvlm_h_72b.yaml", "--world-size", "128", "--gpu-memory-gib", "24")
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT" in done.stdout
    assert done.stderr == ""


REFUSED = {
    "tensor_model_parallel_size=3": "does not divide",
    "pipeline_model_parallel_size=7": "does not divide the 60 layers",
    "pipeline_model_parallel_size=64": "more than the 60 layers",
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


def test_an_image_that_leaves_no_text(printed: dict[str, Printed]) -> None:
    result = printed[NO_TEXT]
    assert result.status == 2
    assert result.err.count("\n") == 1 and "lower tiling.max_tiles or raise data.sequence_length" in result.err


def test_messages_too_short_for_the_context(printed: dict[str, Printed]) -> None:
    result = printed[SHORT_MESSAGES]
    assert result.status == 2
    assert "raise parallelism.payload_vision_tokens to" in result.err


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [128, 1024])
@pytest.mark.parametrize("path", PAPER_RUNS, ids=lambda path: path.stem)
def test_every_run_of_the_paper(path: Path, world_size: int) -> None:
    done = start("--json", "--config", str(path), "--world-size", str(world_size))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["ownership_problems"] == [] and result["fits"]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 8 * 2**20  # KiB, of the largest process so far
