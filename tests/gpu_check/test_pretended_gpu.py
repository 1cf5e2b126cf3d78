"""The training step with tensors on a pretended GPU: no mix of devices, and the numbers of the CPU."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.checkpoint.save_load import CheckpointConfig, Identity, Progress
from megatron_nvlm.core_compat import keep_checkpoint_process
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.gpu_check.host_waits import HostWaits
from megatron_nvlm.models.initialise import named_parameters
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.parallel.device import Device, use_device
from megatron_nvlm.parallel.groups import start_groups
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.step import run_step, wrap_model
from tests.support.batches import step_samples
from tests.support.equality import PRETRAIN, Case, Layout, Record, distances, layout, make_chunks, train
from tests.support.pretended_gpu import needs_compiler, one_gpu, run_gpu_ranks
from tests.support.ranks import run_ranks
from tests.support.tiny import micro_batch_of

pytestmark = [pytest.mark.distributed, needs_compiler]

STEPS = 2
CASES = [Case(variant, "alternating", precision="fp32") for variant in "dxh"]
LAYOUTS = {
    "TP2 with SP": layout(2, tp=2, sp=True),
    "PP2": layout(2, pp=2),
    "PP2 with two virtual stages": layout(2, pp=2, vpp=2),
    "DP2, distributed optimizer": layout(2, dist_opt=True),
    "TP2, encoder tensor parallel": layout(2, tp=2, vision="tensor_parallel"),
    "TP2 with SP, full recompute": layout(2, tp=2, sp=True, recompute="full"),
}


@dataclass
class Seen:
    """What a process with a pretended GPU found."""

    records: list[Record]
    refusal: str = ""
    waits: dict[str, list[str]] = field(default_factory=dict)
    """What was done -> kinds of waits that were counted."""


def steps_of(cases: list[Case], own: Layout, device: Device) -> list[Record]:
    return [train(case, own, device.torch_device, STEPS, keep=False) for case in cases]


def mix_devices(device: Device) -> str:
    try:
        torch.ones(2, device=device.torch_device) + torch.ones(2)
    except RuntimeError as error:
        return str(error)
    return ""


def kinds_of_waits(waits: HostWaits) -> dict[str, list[str]]:
    """Of operations that make the host wait on a GPU, and of some that do not."""
    on_gpu, on_host = torch.arange(6.0, device="cuda"), torch.arange(6.0)
    some = on_gpu > 2

    def fill() -> None:
        on_gpu[some] = 0.0

    done = {
        "item": on_gpu[0].item,
        "a list of scalars": lambda: torch.tensor([on_gpu[0], on_gpu[1]]),
        "tolist": on_gpu.tolist,
        "nonzero": some.nonzero,
        "a mask as index": lambda: on_gpu[some],
        "copy": lambda: on_host.to("cuda"),
        "pageable copy": lambda: on_host.to("cuda", non_blocking=True),
        "synchronize": torch.cuda.synchronize,
        "pinned copy": lambda: on_host.pin_memory().to("cuda", non_blocking=True),
        "sum": on_gpu.sum,
        "fill by a mask": fill,
    }
    found = {}
    for name, call in done.items():
        waits.take()
        call()
        found[name] = [wait.what for wait in waits.take().elements()]
    return found


def save(device: Device, distributed: bool, folder: Path) -> None:
    """Two updates on the GPU, with PyTorch's AdamW, and a save."""
    made = make(device, distributed)
    for step in range(2):
        micro_batches = [micro_batch_of(samples, "h", 1) for samples in step_samples("packed", step)]
        run_step(made[0], iter(micro_batches), len(micro_batches), device.torch_device, made[2])
    saver = CheckpointSaver(RunDir(folder), CheckpointConfig(), Identity("h", "tiny", "tiny", "0"), *made[1:])
    saver.save(Progress(2, DataPosition(4)), wait=True)
    torch.save({name: value.detach().cpu() for name, value in named_parameters(made[1])}, folder / "weights.pt")


def make(device: Device, distributed: bool) -> Any:
    """(wrapped, bare, optimizer, scheduler)."""
    numbers = PRECISIONS["bf16"]
    bare = make_chunks(Case("h", "packed", precision="bf16"), layout(1), device.torch_device)
    wrapped = wrap_model(bare, numbers, distributed)
    return wrapped, bare, *build_optimizer(OptimizerConfig(1e-3, 1e-3, 0), wrapped, 10, numbers, distributed)


def on_gpu(folder: Path) -> Seen:
    with one_gpu() as (device, waits):
        start_groups(layout(1).parallelism, device, seed=1)
        keep_checkpoint_process()
        seen = Seen(steps_of(CASES, layout(1), device), mix_devices(device), kinds_of_waits(waits))
        for distributed in (True, False):
            (folder / str(distributed)).mkdir()
            save(device, distributed, folder / str(distributed))
        return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved_on_gpu")


@pytest.fixture(scope="module")
def seen(folder: Path) -> Seen:
    return run_gpu_ranks(1, on_gpu, folder)[0]


def check_equal(cases: list[Case], got: list[Record], expected: list[Record]) -> None:
    for case, ours, theirs in zip(cases, got, expected, strict=True):
        assert ours.targets == theirs.targets
        apart = distances("loss", ours.losses, theirs.losses) | distances("norm", ours.grad_norms, theirs.grad_norms)
        assert max(apart.values()) < 1e-5, (case.variant, apart)


def test_steps_equal_those_of_the_cpu(seen: Seen, world_of_one: Device) -> None:
    check_equal(CASES, seen.records, steps_of(CASES, layout(1), world_of_one))


def test_a_mix_of_devices_is_refused(seen: Seen) -> None:
    assert "same device" in seen.refusal


def test_waits_are_counted(seen: Seen) -> None:
    counts = {name: len(kinds) for name, kinds in seen.waits.items()}
    assert counts == {
        **dict.fromkeys(("item", "tolist", "nonzero", "a mask as index", "copy", "pageable copy", "synchronize"), 1),
        "a list of scalars": 2,
        **dict.fromkeys(("pinned copy", "sum", "fill by a mask"), 0),
    }


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "whole optimizer"])
def test_a_save_on_a_gpu_loads_on_the_cpu(distributed: bool, seen: Seen, folder: Path, world_of_one: Device) -> None:
    _, bare, optimizer, scheduler = make(world_of_one, distributed)
    own = folder / str(distributed)
    save_load.load(own / "checkpoints" / "step_00000002", bare, optimizer, scheduler)
    expected = torch.load(own / "weights.pt")
    for name, parameter in named_parameters(bare):
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=0, msg=name)


def layout_on_gpu(cases: list[Case], own: Layout) -> list[Record]:
    with one_gpu() as (device, _):
        start_groups(own.parallelism, device, seed=1)
        return steps_of(cases, own, device)


def layout_on_cpu(cases: list[Case], own: Layout) -> list[Record]:
    device = use_device()
    start_groups(own.parallelism, device, seed=1)
    return steps_of(cases, own, device)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_those_of_the_cpu(name: str) -> None:
    cases = [*CASES, Case("x", "alternating", PRETRAIN, precision="fp32")]
    own = LAYOUTS[name]
    for ours, theirs in zip(
        run_gpu_ranks(own.ranks, layout_on_gpu, cases, own),
        run_ranks(own.ranks, layout_on_cpu, cases, own),
        strict=True,
    ):
        check_equal(cases, ours, theirs)
