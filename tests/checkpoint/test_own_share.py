"""The distributed optimizer's state: each rank gives and takes its own share, and the checkpoint's tensors are whole."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.checkpoint.save_load import CheckpointConfig, Identity, Progress
from megatron_nvlm.core_compat import boxes_of, keep_checkpoint_process
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.parallel.device import Device, use_device
from megatron_nvlm.parallel.groups import start_groups
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.step import wrap_model
from tests.support.equality import Case, Layout, layout, make_chunks
from tests.support.ranks import run_ranks

FP32 = PRECISIONS["fp32"]
REPLICAS = layout(2, dist_opt=True)
LAYOUTS = {
    "one rank": layout(1, dist_opt=True),
    "tensor parallel, three heads of the encoder too": layout(
        2, tp=2, sp=True, vision="tensor_parallel", dist_opt=True
    ),
    "pipeline": layout(2, pp=2, dist_opt=True),
    "replicas": REPLICAS,
}


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 3, 4), (1, 1, 5), (3, 1, 2, 2)])
def test_a_flat_range_is_rectangles(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start, end in itertools.combinations(range(whole.numel() + 1), 2):
        numbers: list[int] = []
        for offsets, sizes in boxes_of(shape, start, end):
            box = whole[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))]
            assert box.shape == sizes
            numbers += box.flatten().tolist()
        assert numbers == list(range(start, end))


def make(own: Layout) -> tuple[Any, Any, Any]:
    """Chunks, optimizer and schedule, with moments that are multiples of their weights."""
    device = use_device()
    start_groups(own.parallelism, device, seed=1)
    keep_checkpoint_process()
    chunks = make_chunks(Case("h", "mixed", precision="fp32"), own, device.torch_device)
    models = wrap_model(chunks, FP32, use_distributed_optimizer=True)
    optimizer, schedule = build_optimizer(OptimizerConfig(1e-3, 1e-3, 0), models, 5, FP32, True)
    for model in models:
        model.zero_grad_buffer()
    optimizer.step()  # makes the moments
    for main, state in optimizer.chained_optimizers[0].optimizer.state.items():
        state["exp_avg"].copy_(2 * main)
        state["exp_avg_sq"].copy_(3 * main)
    return chunks, optimizer, schedule


def save(own: Layout, folder: Path, read: Path | None = None, as_core: bool = False) -> None:
    """On each rank: save what `make` gives or, with `read`, zeros into which another checkpoint was loaded."""
    of_core = DistributedOptimizer.sharded_param_state_fully_reshardable
    state = make(own)
    if read is not None:
        for main, moments in state[1].chained_optimizers[0].optimizer.state.items():
            for tensor in (main, moments["exp_avg"], moments["exp_avg_sq"]):
                tensor.data.zero_()
        save_load.load(step(read), *state)
    if as_core:
        DistributedOptimizer.sharded_param_state_fully_reshardable = of_core
    saver = CheckpointSaver(RunDir(folder), CheckpointConfig(), Identity("h", "parity", "parity", "0"), *state)
    saver.save(Progress(1, DataPosition(8)), wait=True)


def step(folder: Path) -> Path:
    return folder / "checkpoints" / "step_00000001"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = dist_checkpointing.load_plain_tensors(str(step(folder)))
    return {name: tensor for name, tensor in found.items() if torch.is_tensor(tensor)}


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_whole_tensors_go_from_layout_to_layout(tmp_path: Path, world_of_one: Device) -> None:
    """Also out of a checkpoint as core writes it, and as this project wrote it before."""
    run_ranks(2, save, REPLICAS, tmp_path / "of core", None, True)
    expected = tensors(tmp_path / "of core")
    assert sum(name.startswith("optimizer.state.exp_avg.") for name in expected) > 50
    before = tmp_path / "of core"
    for name, own in LAYOUTS.items():
        run_ranks(own.ranks, save, own, tmp_path / name, before)
        before = tmp_path / name
        found = tensors(before)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), f"{name}: {key}"
            if key.startswith("optimizer.state.exp_avg."):
                weight = found[key.removeprefix("optimizer.state.exp_avg.")]
                torch.testing.assert_close(tensor, 2 * weight, msg=key)


def bytes_of_a_save() -> tuple[int, int, int]:
    """Bytes of this rank's optimizer, of what it gives to a save, and of that what is not in the optimizer's memory."""
    chunks, optimizer, schedule = make(REPLICAS)
    own = [
        tensor
        for main, state in optimizer.chained_optimizers[0].optimizer.state.items()
        for tensor in (main.data, state["exp_avg"], state["exp_avg_sq"])
    ]
    places = {tensor.untyped_storage().data_ptr() for tensor in own}
    state = save_load.state_to_save(Progress(1, DataPosition(8)), chunks, optimizer, schedule)
    given = [value.data for value in nested_values(state["optimizer"]["param_state"])]
    copied = sum(tensor.nbytes for tensor in given if tensor.untyped_storage().data_ptr() not in places)
    return sum(tensor.nbytes for tensor in own), sum(tensor.nbytes for tensor in given), copied


@pytest.mark.distributed
def test_a_save_takes_no_memory_and_no_more_than_a_ranks_share() -> None:
    for own, given, copied in run_ranks(2, bytes_of_a_save):
        assert own == given and copied == 0
