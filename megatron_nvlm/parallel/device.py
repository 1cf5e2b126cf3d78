"""CPU with gloo or GPU with NCCL: the one switch, and all that depends on it."""

import os
from dataclasses import dataclass

import torch

from megatron_nvlm.core_compat import (
    keep_gradient_norms_on_device,
    mend_distributed_optimizer,
    run_core_on_cpu,
    use_known_message_shapes,
)
from megatron_nvlm.errors import UserError

DEVICES = ("auto", "cpu", "cuda")
"""Values of `training.device`; auto is a GPU where there is one."""


@dataclass(frozen=True)
class Device:
    """Where this process computes and how it talks to others."""

    torch_device: torch.device
    communication: str


def use_device(choice: str = "auto") -> Device:
    """Take this process's GPU, or prepare Megatron-core for the CPU. Call before core is used.

    Args:
        choice: one of DEVICES.

    Raises:
        UserError: the machine has fewer GPUs than ranks.
    """
    mend_distributed_optimizer()
    keep_gradient_norms_on_device()
    use_known_message_shapes()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if choice == "cpu" or (choice == "auto" and not gpus):
        run_core_on_cpu()
        return Device(torch.device("cpu"), "gloo")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), index + 1)
    if ranks > gpus:
        raise UserError(
            f"{ranks} ranks were started on a machine with {gpus} GPUs that they can see, and each rank takes one; start as "
            "many ranks as GPUs, or set training.device=cpu"
        )
    torch.cuda.set_device(index)
    return Device(torch.device("cuda", index), "nccl")


def cuda_and_nccl_versions() -> tuple[str, str] | None:
    """Those that torch uses; None where it sees no GPU."""
    if not torch.cuda.is_available():
        return None
    return str(torch.version.cuda), ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def gpu_memory_bytes() -> int | None:
    """Of this process's GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def wait_for(device: torch.device) -> None:
    """Until the device has done all work in its queue; the CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
