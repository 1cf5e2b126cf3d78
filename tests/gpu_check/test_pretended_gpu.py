"""The training step with tensors on a pretended GPU: no mix of devices, and the numbers of the CPU."""

import pytest

from megatron_nvlm.gpu_check.host_waits import Wait
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import start_groups
from tests.support.equality import Case, Layout, Record, distances, layout, train
from tests.support.pretended_gpu import needs_compiler, one_gpu, run_gpu_ranks
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.distributed, needs_compiler]

STEPS = 2


def on_gpu(cases: list[Case], own: Layout) -> tuple[list[Record], dict[Wait, int]]:
    with one_gpu() as (device, waits):
        start_groups(own.parallelism, device, seed=1)
        records = [train(case, own, device.torch_device, STEPS, keep=False) for case in cases]
        return records, dict(waits.take())


def on_cpu(cases: list[Case], own: Layout) -> list[Record]:
    device = use_device()
    start_groups(own.parallelism, device, seed=1)
    return [train(case, own, device.torch_device, STEPS, keep=False) for case in cases]


def test_steps_equal_those_of_the_cpu() -> None:
    cases = [Case(variant, "alternating", precision="fp32") for variant in "dxh"]
    ((got, waits),) = run_gpu_ranks(1, on_gpu, cases, layout(1))
    print(waits)
    (expected,) = run_ranks(1, on_cpu, cases, layout(1))
    for case, ours, theirs in zip(cases, got, expected, strict=True):
        assert ours.targets == theirs.targets
        apart = distances("loss", ours.losses, theirs.losses) | distances("norm", ours.grad_norms, theirs.grad_norms)
        assert max(apart.values()) < 1e-5, (case.variant, apart)
