"""A step's own count: against torch's FLOP counter over the whole step, and the dry run; with any peak and padding."""

import dataclasses
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_nvlm.accounting.flops import NO_WORK, Work, count_flops, count_work, sizes_of, whole_model
from megatron_nvlm.config.load import load_run
from megatron_nvlm.estimate.dry_run import quick_dry_run
from megatron_nvlm.estimate.ranks import build_whole
from megatron_nvlm.estimate.sample import SampleShape, make_micro_batch
from megatron_nvlm.estimate.step_time import Hardware
from megatron_nvlm.models.config import resolve_model
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.runs.plan import make_plan
from megatron_nvlm.runs.resolve import resolve_run
from megatron_nvlm.sequence.micro_batch import MicroBatch
from megatron_nvlm.training.accounting import WORK, Accounting
from megatron_nvlm.training.step import run_step, wrap_model
from megatron_nvlm.training.trainable import COMPONENTS, RECIPES, freeze
from tests.support.batches import BATCH_KINDS, Draw
from tests.support.tiny import VISION, micro_batch_of, tiny_config, tiny_model

TOLERANCE = 0.02
"""Relative, of what torch counts; X's projector and what core makes of gradients that nobody asks for are not counted."""
CPU = torch.device("cpu")


def accounting_of(variant: str, trainable: tuple[str, ...], recompute: str = "none", ranks: int = 1) -> Accounting:
    config = dataclasses.replace(tiny_config(variant), recompute=recompute)
    return Accounting(sizes_of(resolve_model(config), ParallelismConfig()), trainable, CPU, ranks)


def batches(kind: str, variant: str, token_multiple: int = 1) -> list[MicroBatch]:
    return [micro_batch_of(samples, variant, token_multiple) for samples in BATCH_KINDS[kind](Draw(7))]


def executed(accounting: Accounting, work: Work) -> int:
    return sum(part.executed for part in accounting.step_flops(work).values())


def filled(micro_batch: MicroBatch) -> Work:
    """The work with every pair that the CPU's attention fills: samples of similar length run as one padded batch."""
    work = count_work(micro_batch, VISION.tokens_per_tile, dense_attention=True)
    lengths = [end - start for start, end in pairwise(micro_batch.boundaries)]
    longest = max(lengths)
    if len(lengths) == 1 or longest * len(lengths) > 2 * sum(lengths):
        return work
    return dataclasses.replace(work, self_pairs=len(lengths) * longest**2)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("trainable", [COMPONENTS, RECIPES["sft"], RECIPES["pretrain"]], ids=["all", "sft", "pretrain"])
@pytest.mark.parametrize("variant", "dxh")
def test_a_step_of_packs(variant: str, trainable: tuple[str, ...], recompute: str, world_of_one: Device) -> None:
    """Micro-batches of three samples through `run_step`. Torch counts whole score matrices, and the step half of them: what
    lies between is the attention of pairs that are masked, and nothing else."""
    config = dataclasses.replace(tiny_config(variant), recompute=recompute)
    model = tiny_model(config, world_of_one)
    freeze(model, trainable)
    models = wrap_model(model, PRECISIONS["fp64"], use_distributed_optimizer=False)
    accounting = accounting_of(variant, trainable, recompute)
    micro_batches = batches("packed", variant)
    metered = accounting.meter(iter(micro_batches))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run_step(models, metered, len(micro_batches), CPU, optimizer=None)
    dense = NO_WORK
    for micro_batch in micro_batches:
        dense += filled(micro_batch)
    assert executed(accounting, dense) == pytest.approx(counter.get_total_flops(), rel=TOLERANCE)
    masked = dataclasses.replace(
        NO_WORK,
        self_pairs=dense.self_pairs - metered.work.self_pairs,
        context_pairs=dense.context_pairs - metered.work.context_pairs,
    )
    assert masked.self_pairs > 0
    assert executed(accounting, metered.work) == executed(accounting, dense) - executed(accounting, masked)


@pytest.mark.parametrize("kind", BATCH_KINDS)
@pytest.mark.parametrize("variant", "dxh")
def test_padding_is_no_work_and_has_its_share(variant: str, kind: str) -> None:
    accounting = accounting_of(variant, COMPONENTS)
    plain, padded = (accounting.meter(iter(batches(kind, variant, multiple))) for multiple in (1, 64))
    list(plain), list(padded)
    assert plain.work == padded.work
    real = plain.work.num_tokens + plain.work.num_context_tokens
    shares = []
    for metered in (plain, padded):
        merged = {metric.name: metric.value for metric in accounting.metrics(metered, True)} | {"samples": 4}
        shares.append(accounting.fields(merged, 2.0)["padding_share"])
    # Where nothing stands in the context of X and H it is one token, so that all micro-batches make the same calls.
    works = [count_work(micro_batch, VISION.tokens_per_tile) for micro_batch in batches(kind, variant)]
    lone = sum(not work.num_context_tokens for work in works) if variant != "d" else 0
    assert plain.rows == real + lone and shares[0] == 1 - real / plain.rows
    assert shares[1] == 1 - real / padded.rows > 0


def test_a_micro_batch_whose_samples_are_all_bad_is_no_work() -> None:
    empty = dataclasses.replace(batches("text only", "h")[0], keys=())
    assert count_work(empty, VISION.tokens_per_tile) == NO_WORK
    accounting = accounting_of("h", COMPONENTS)
    metered = accounting.meter(iter([empty]))
    list(metered)
    merged = {metric.name: metric.value for metric in accounting.metrics(metered, True)} | {"samples": 0}
    fields = accounting.fields(merged, 1.0)
    assert fields["model_flops"] == fields["vision_share"] == 0 and fields["padding_share"] == 1


@pytest.fixture(scope="module")
def another_process() -> Iterator[ProcessPoolExecutor]:
    """One that is in no process group, as a dry run needs it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def counted_and_predicted(name: str, world_size: int, overrides: list[str]) -> tuple[float, float, float, float]:
    """Model FLOPs and hardware FLOPs as the run counts them, and as the dry run predicts them."""
    run = resolve_run(load_run(name, overrides), world_size)
    plan = make_plan(run, SampleShape(run.config.data.sequence_length, run.config.tiling.max_tiles, 5))
    sizes = sizes_of(run.model, run.config.parallelism)
    accounting = Accounting(sizes, run.trainable, CPU, run.world_size)
    made = make_micro_batch(plan.sample, sizes.variant, sizes.vision.tokens_per_tile, plan.micro_batch_size)
    metered = accounting.meter(iter([made] * plan.micro_batches * plan.replicas))
    list(metered)
    merged = {metric.name: metric.value for metric in accounting.metrics(metered, True)}
    fields = accounting.fields(merged | {"samples": plan.global_batch_size}, 1.0)
    whole = build_whole(plan.model, plan.dtype, plan.trainable)
    predicted = quick_dry_run(plan, Hardware(), "local", whole).step_flops
    return fields["model_flops"], fields["hardware_flops"], predicted.model, predicted.executed


@pytest.mark.parametrize(
    ("name", "world_size", "overrides"),
    [
        ("demo_h", 2, []),
        ("demo_d", 2, ["recipe={name: sft, trainable: null}", "model.recompute=selective"]),
        ("demo_x", 2, ["recipe={name: pretrain, trainable: null}", "parallelism.vision_placement=replicated"]),
        ("sft_nvlm_x_34b", 128, []),
        ("pretrain_nvlm_x_72b", 128, []),
    ],
)
def test_the_dry_run_predicts_what_the_run_counts(
    name: str, world_size: int, overrides: list[str], another_process: ProcessPoolExecutor
) -> None:
    """For a batch of the samples that the dry run reckons with, whatever the sizes of the model."""
    found = another_process.submit(counted_and_predicted, name, world_size, overrides).result()
    assert found[:2] == found[2:]


RATES = st.floats(1e-3, 1e4)
COUNTS = st.integers(0, 10**9)


@given(st.builds(Work, *[COUNTS] * 6), RATES, st.sampled_from([1, 2, 128]), st.floats(1, 3000), RATES)
def test_rates_and_shares(work: Work, seconds: float, ranks: int, peak: float, waited: float) -> None:
    accounting = dataclasses.replace(accounting_of("h", RECIPES["sft"], "full", ranks), peak_by_hand=peak)
    merged = {WORK + name: float(value) for name, value in dataclasses.asdict(work).items()}
    merged |= {"samples": 8.0, "rows": float(work.num_tokens + work.num_context_tokens), "data_wait_seconds": waited}
    merged |= {"peak_memory_bytes": 2.0**31, "ranks_without_peak": 0.0, "peak_tflops": ranks * peak}
    fields = accounting.fields(merged, seconds)
    numbers = {name: value for name, value in fields.items() if isinstance(value, int | float)}
    assert all(math.isfinite(value) and value >= 0 for value in numbers.values())
    assert fields["model_flops"] == sum(fields["flops"].values())
    assert fields["model_flops"] <= fields["hardware_flops"]
    assert numbers["mfu"] == pytest.approx(numbers["tflops_per_rank"] / peak)
    assert numbers["hfu"] == pytest.approx(numbers["hardware_tflops_per_rank"] / peak)
    assert 0 <= numbers["vision_share"] <= 1 and 0 <= numbers["data_wait_share"] <= 1 and numbers["padding_share"] == 0
    assert numbers["peak_memory_gib"] == 2
    for name, count in (("samples", 8), ("tokens", work.num_tokens), ("tiles", work.tiles)):
        assert numbers[f"{name}_per_second_per_rank"] * seconds * ranks == pytest.approx(count)
    one_unknown = accounting.fields(merged | {"ranks_without_peak": 1.0}, seconds)
    assert "mfu" not in one_unknown and "hfu" not in one_unknown


def test_the_peak_is_named_or_its_lack_is() -> None:
    accounting = accounting_of("h", COMPONENTS)
    assert accounting.peak_tflops is None
    assert accounting.describe() == (
        "no MFU: the peak of a CPU is not in the table of GPUs; logging.peak_tflops gives it by hand"
    )
    by_hand = dataclasses.replace(accounting, peak_by_hand=0.2)
    assert by_hand.peak_tflops == 0.2
    assert by_hand.describe() == "MFU is a share of 0.2 TFLOP/s a rank (logging.peak_tflops, a CPU)"


def test_whole_model_of_a_step_is_its_components() -> None:
    accounting = accounting_of("x", RECIPES["sft"])
    work = Work(10, 55, 20, 100, 2, 3)
    parts = accounting.step_flops(work)
    assert set(parts) == {"vision_model", "vision_projection", "cross_attention", "language_model"}
    whole = whole_model(accounting.sizes, count_flops(accounting.sizes, work, accounting.trainable))
    assert sum(part.model for part in parts.values()) == whole.model
