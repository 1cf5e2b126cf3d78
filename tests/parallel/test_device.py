"""Which device a rank takes, and that a user can say so. GPUs are claimed here, in processes of their own."""

import os

import pytest
import torch

from megatron_nvlm.errors import UserError
from megatron_nvlm.parallel.device import Device, use_device
from megatron_nvlm.parallel.groups import start_groups
from tests.support.equality import Case, layout, train
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def claim_gpus(number: int) -> None:
    torch.cuda.is_available = torch.accelerator.is_available = lambda: number > 0
    torch.cuda.device_count = torch.accelerator.device_count = lambda: number


def train_on_the_cpu(gpus: int) -> tuple[list[float], str]:
    """Losses, and the device: of a machine that has some number of GPUs."""
    claim_gpus(gpus)
    device = use_device("cpu")
    own = layout(1, dist_opt=True)
    start_groups(own.parallelism, device, seed=1)
    return train(Case("h", "mixed", precision="fp32"), own, device.torch_device, 2, keep=False).losses, str(device)


def test_the_cpu_can_be_chosen_where_there_are_gpus() -> None:
    ((losses, device),) = run_ranks(1, train_on_the_cpu, 8)
    assert device == str(Device(torch.device("cpu"), "gloo"))
    assert losses == run_ranks(1, train_on_the_cpu, 0)[0][0]


def refusal(choice: str, gpus: int, local_ranks: int) -> str:
    claim_gpus(gpus)
    os.environ["LOCAL_WORLD_SIZE"] = str(local_ranks)
    try:
        use_device(choice)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("choice", "gpus", "ranks"), [("auto", 1, 2), ("cuda", 0, 2)])
def test_more_ranks_than_gpus_are_one_sentence_on_every_rank(choice: str, gpus: int, ranks: int) -> None:
    said = (
        f"2 ranks were started on a machine with {gpus} GPUs that they can see, and each rank takes one; start as many"
    )
    for message in run_ranks(ranks, refusal, choice, gpus, ranks):
        assert message.startswith(said) and message.endswith("or set training.device=cpu")


def test_without_a_gpu_the_cpu_is_taken() -> None:
    assert run_ranks(1, refusal, "auto", 0, 1) == [""]
