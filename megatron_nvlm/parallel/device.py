"""CPU with gloo or GPU with NCCL: the one switch, and all that depends on it."""

import os
import resource
import sys
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


def device_name(device: torch.device) -> str | None:
    """The name that CUDA gives a GPU; None for a CPU."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory_is_of(device: torch.device) -> str:
    """Whose memory `take_peak_memory` tells: the device's, or on a CPU this process's."""
    return "device" if device.type == "cuda" else "process"


def take_peak_memory(device: torch.device) -> int:
    """Bytes at the fullest moment: allocated on the GPU since the last call, or resident in this process since it began."""
    if device.type == "cuda":
        peak = int(torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def wait_for(device: torch.device) -> None:
    """Until the device has done all work in its queue; the CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
