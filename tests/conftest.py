"""Fixtures of all tests. This process is a distributed world of one; tests of several ranks start their own."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():  # no GPU: Triton kernels run in its interpreter, chosen when they are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import settings

from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import Device, use_device
from megatron_nvlm.parallel.groups import start_groups

settings.register_profile("shared_machine", deadline=None)  # a slow moment of the machine is no failure
settings.load_profile("shared_machine")

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"


@pytest.fixture(scope="session")
def world_of_one() -> Device:
    """Process groups of this process alone."""
    torch.set_num_threads(1)
    device = use_device()
    start_groups(ParallelismConfig(), device, seed=1)
    return device


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of numbers made by the original NVLM-D code."""
    if not (REFERENCE / "nvlm_d_tiny").is_dir():
        pytest.skip("the numbers of the original NVLM-D code are not here (13 MB, not part of the repository)")
    return REFERENCE
