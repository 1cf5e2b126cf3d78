"""A rank's training step on fake CUDA tensors: the host waits once, bytes are those of the dry run."""

import pytest

from megatron_nvlm.commands.gpu_check import BACKEND, MOST_WAITS
from megatron_nvlm.config.load import load_run
from megatron_nvlm.estimate.sample import SampleShape
from megatron_nvlm.gpu_check.comparison import Row, compare, estimate
from megatron_nvlm.gpu_check.fake_step import FakeStep, FakeStepInput, run_fake_steps
from megatron_nvlm.runs.plan import TAG_TOKENS
from megatron_nvlm.runs.resolve import resolve_run
from tests.support.pretended_gpu import needs_compiler
from tests.support.ranks import run_ranks

pytestmark = needs_compiler

SMALL = ("training.micro_batch_size=1", "training.global_batch_size=8", BACKEND)
TINY = {
    "D": FakeStepInput("configs/demo_d.yaml", SMALL, 4, micro_batches=1, num_tokens=300, regular_tiles=2),
    "H": FakeStepInput("configs/demo_h.yaml", SMALL, 4, num_tokens=150, regular_tiles=2),
    "X, tiles of the step shared": FakeStepInput(
        "configs/demo_x.yaml",
        (*SMALL, "parallelism.vision_placement=replicated", "recipe.trainable=[vision_projection,cross_attention]"),
        4,
        num_tokens=120,
        regular_tiles=2,
    ),
    "X, second of two stages": FakeStepInput(
        "configs/demo_x.yaml",
        (*SMALL, "parallelism.pipeline_model_parallel_size=2"),
        4,
        stage=1,
        num_tokens=120,
        regular_tiles=2,
    ),
}


def rows_of(steps: dict[str, tuple[FakeStepInput, FakeStep]]) -> dict[str, list[Row]]:
    """In a process that is in no process group, as the dry run wants it."""
    found = {}
    for name, (wanted, fake) in steps.items():
        run = resolve_run(load_run(wanted.config, list(wanted.overrides)), wanted.world_size)
        tags = 0 if run.config.tiling.tag_format == "none" else TAG_TOKENS
        tokens = wanted.num_tokens or run.config.data.sequence_length
        tiles = run.config.tiling.max_tiles if wanted.regular_tiles is None else wanted.regular_tiles
        found[name] = compare(fake, wanted, estimate(run, SampleShape(tokens, tiles, tags), wanted.micro_batches))
    return found


def carry_out(cases: dict[str, FakeStepInput]) -> tuple[dict[str, FakeStep], dict[str, dict[str, Row]]]:
    steps = dict(zip(cases, run_fake_steps(list(cases.values())), strict=True))
    (rows,) = run_ranks(1, rows_of, {name: (cases[name], step) for name, step in steps.items()})
    return steps, {name: {row.what: row for row in found} for name, found in rows.items()}


def check_waits(fake: FakeStep) -> None:
    assert fake.total_waits <= MOST_WAITS, fake.waits
    assert fake.operations > 100


def test_tiny_steps() -> None:
    steps, rows = carry_out(TINY)
    for name, fake in steps.items():
        check_waits(fake)
        assert bool(fake.triton_launches.get("forward_kernel")) == (name != "D")  # a GPU's kernels, not the plain forms
        for what in ("weights", "gradients"):
            assert abs(rows[name][what].apart) < 0.01, (name, rows[name][what])  # blocks of 512 bytes
        assert rows[name]["sent, data parallel"].apart == pytest.approx(0, abs=0.01), name


LARGE = {
    name: FakeStepInput(f"configs/{name}.yaml", (BACKEND,), 128)
    for name in ("sft_nvlm_h_34b", "sft_nvlm_x_34b", "sft_nvlm_h_72b", "pretrain_nvlm_d_34b")
}
LARGE |= {
    f"{name}, stage {stage}": FakeStepInput(f"configs/{name}.yaml", (BACKEND,), 128, stage, micro_batches=4)
    for name in ("sft_nvlm_d_34b", "sft_nvlm_d_72b")
    for stage in (0, 3)
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_real_shapes(name: str) -> None:
    steps, rows = carry_out({name: LARGE[name]})
    check_waits(steps[name])
    assert abs(rows[name]["peak"].apart) < 0.1, rows[name]
    if "stage" not in name:  # the estimate is of the slowest stage
        assert abs(rows[name]["sent, tensor parallel"].apart) < 0.1, rows[name]
