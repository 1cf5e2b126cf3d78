"""Ranks whose tensors lie on a pretended GPU (megatron_nvlm/gpu_check/pretended_gpu.py) and talk over gloo."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_nvlm.core_compat import (
    keep_gradient_norms_on_device,
    mend_distributed_optimizer,
    use_known_message_shapes,
)
from megatron_nvlm.gpu_check import pretended_gpu
from megatron_nvlm.gpu_check.host_waits import HostWaits
from megatron_nvlm.parallel.device import Device
from tests.support.ranks import run_ranks

GPU = torch.device("cuda", 0)

needs_compiler = pytest.mark.skipif(
    pretended_gpu.find_compiler() is None, reason="no C++ compiler, and a GPU is pretended by a library of C++"
)


class OverGloo(TorchDispatchMode):
    """Collectives of tensors on the GPU, carried out on the memory that they have on the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if not function.name().startswith("c10d::"):
            return function(*given[0], **given[1])
        leaves, shape = pytree.tree_flatten(given)
        moved = [_on_host(leaf) for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(moved, shape)
        originals = {id(after): before for before, after in zip(leaves, moved, strict=True)}
        addresses = {
            after.data_ptr(): before
            for before, after in zip(leaves, moved, strict=True)
            if isinstance(after, torch.Tensor) and after.numel()
        }

        def original(value: Any) -> Any:
            found = originals.get(id(value))
            return found if found is not None else addresses.get(value.data_ptr(), value)

        return pytree.tree_map_only(torch.Tensor, original, function(*args, **kwargs))


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_cuda:
        return torch.ops.nvlm_pretended_gpu.on_host(value)
    return value


@contextmanager
def one_gpu() -> Iterator[tuple[Device, HostWaits]]:
    """This rank's pretended GPU, and what makes the host wait for it."""
    pretended_gpu.pretend()
    mend_distributed_optimizer()
    keep_gradient_norms_on_device()
    use_known_message_shapes()
    with ExitStack() as stack:
        stack.enter_context(OverGloo())
        waits = stack.enter_context(HostWaits())
        yield Device(GPU, "gloo"), waits


def run_gpu_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """As `run_ranks`, for functions that call `one_gpu`; plain forms run where a GPU would run a Triton kernel."""
    with patch.dict(os.environ, {**pretended_gpu.environment(), "NVLM_KERNELS": "plain"}):
        return run_ranks(world_size, function, *args)
