"""CPU with gloo or GPU with NCCL: the one switch, and all that depends on it."""

import os
from dataclasses import dataclass

import torch

from megatron_nvlm.core_compat import mend_distributed_optimizer, run_core_on_cpu


@dataclass(frozen=True)
class Device:
    """Where this process computes and how it talks to others."""

    torch_device: torch.device
    communication: str


def use_device() -> Device:
    """Take this process's GPU if there is one, else prepare Megatron-core for the CPU. Call before core is used."""
    mend_distributed_optimizer()
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(index)
        return Device(torch.device("cuda", index), "nccl")
    run_core_on_cpu()
    return Device(torch.device("cpu"), "gloo")
