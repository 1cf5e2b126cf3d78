"""Properties of the cost model; its seconds are predictions and are not tested."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.accounting.flops import count_flops, count_work, whole_model
from megatron_nvlm.estimate.activation_bytes import ActivationModel, ChunkSizes, micro_batches_in_flight
from megatron_nvlm.estimate.sample import SampleShape, make_micro_batch
from megatron_nvlm.estimate.step_time import Hardware, StepWork, bubble_fraction, predict_step
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.training.trainable import RECIPES
from tests.support.paper import paper_sizes

counts = st.integers(1, 64)


@given(stages=counts, chunks=st.integers(1, 4), micro_batches=counts)
def test_bubble(stages: int, chunks: int, micro_batches: int) -> None:
    bubble = bubble_fraction(stages, chunks, micro_batches)
    assert 0 <= bubble < 1
    assert (bubble == 0) == (stages == 1)
    assert bubble_fraction(stages, chunks, micro_batches + 1) <= bubble
    assert bubble_fraction(stages, chunks + 1, micro_batches) <= bubble


def test_the_textbook_bubble() -> None:
    assert bubble_fraction(4, 1, 8) == pytest.approx(3 / 11)
    assert bubble_fraction(4, 2, 8) == pytest.approx(1.5 / 9.5)


@given(stages=counts, micro_batches=counts)
def test_earlier_stages_hold_more_micro_batches(stages: int, micro_batches: int) -> None:
    held = [micro_batches_in_flight(stage, stages, 1, micro_batches) for stage in range(stages)]
    assert held == sorted(held, reverse=True)
    assert held[-1] == 1
    assert max(held) <= micro_batches


def step_seconds(hardware: Hardware) -> float:
    sizes = paper_sizes("h")
    work = count_work(make_micro_batch(SampleShape(1280, 6, 5), sizes.variant, 256, 1), 256)
    parallelism = ParallelismConfig(tensor_model_parallel_size=8, sequence_parallel=True)
    chunk = ChunkSizes(60, 10, has_encoder=True, has_projector=True, has_output=True)
    flops = count_flops(sizes, work, RECIPES["sft"])
    return predict_step(
        StepWork(flops, work, sizes, [[chunk]], parallelism, 16, 16, 10**10, 5 * 10**9, 0), hardware
    ).total


def test_faster_hardware_is_faster() -> None:
    base = step_seconds(Hardware())
    assert step_seconds(Hardware(utilisation=0.8)) < base
    assert step_seconds(Hardware(node_gigabytes_per_second=900)) < base
    assert step_seconds(Hardware(network_gigabytes_per_second=100)) < base


def test_one_gpu_at_full_use_takes_its_operations_over_its_peak() -> None:
    sizes = paper_sizes("d")
    work = count_work(make_micro_batch(SampleShape(2816, 6, 5), sizes.variant, 256, 1), 256)
    flops = count_flops(sizes, work, RECIPES["sft"])
    chunk = ChunkSizes(60, 0, has_encoder=True, has_projector=True, has_output=True)
    step = StepWork(flops, work, sizes, [[chunk]], ParallelismConfig(), 3, 1, 1, 1, 0)
    time = predict_step(step, Hardware(utilisation=1))
    assert time.total == pytest.approx(3 * whole_model(sizes, flops).executed / 989e12)


def test_recomputing_keeps_less() -> None:
    kept = []
    for recompute in ("full", "none"):
        sizes = paper_sizes("h", recompute)
        work = count_work(make_micro_batch(SampleShape(1280, 6, 5), sizes.variant, 256, 1), 256)
        model = ActivationModel(sizes, ParallelismConfig(), torch.bfloat16, RECIPES["sft"], "te")
        kept.append(model.chunk(ChunkSizes(60, 10, False, False, False), work).kept)
    assert kept[0] < kept[1] / 10
