"""What fake tensors cannot do by themselves: values that the host reads, kernels of Triton, fused attention, messages.

A fake tensor has a shape, a type and a device, and no values. Each stand-in makes results of the right shape and keeps for
the backward pass what the real operation keeps.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class _FlashAttention(torch.autograd.Function):
    """Memory of fused attention: inputs, output and one number a token and head for the backward pass; no scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        statistics = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, statistics)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class Functions(TorchFunctionMode):
    """Stands in for functions of torch that look at values, or choose a kernel by the build of torch."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _FlashAttention.apply(*args[:3])
        return function(*args, **(kwargs or {}))


def _tolist(tensor: Tensor) -> Any:
    """In the place of a fake tensor's."""
    tensor.cpu()  # one copy, as on a GPU
    return _ones(tensor.shape, tensor.dtype)


def _ones(shape: Sequence[int], dtype: torch.dtype) -> Any:
    """A nested list of ones."""
    if not shape:
        return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
    return [_ones(shape[1:], dtype) for _ in range(shape[0])]


class Values(TorchDispatchMode):
    """Answers what the host asks of one value; pins; takes messages that torch's fake collectives do not know."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        if name == "aten::_pin_memory" and isinstance(args[0], FakeTensor):
            return args[0].clone()
        if name == "aten::_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return _ones((), args[0].dtype)
        if name.startswith("c10d::") and "coalesced" in name:
            return FakeWork().boxed()
        return function(*args, **kwargs)


class Launches:
    """Kernels of Triton: launched, they do nothing and are counted."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def run(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        """In the place of Triton's launcher."""
        self.found[kernel.fn.__name__.strip("_")] += 1


@contextmanager
def standing_in() -> Iterator[Launches]:
    """All stand-ins, for fake tensors on CUDA in a fake process group."""
    import torch.distributed._tools.fake_collectives  # noqa: F401  (registers them)

    launches = Launches()
    with ExitStack() as stack:
        for patched in _patches(launches):
            stack.enter_context(patched)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(Values())
        stack.enter_context(Functions())
        yield launches


def _patches(launches: Launches) -> Iterator[Any]:
    yield patch.object(FakeTensor, "tolist", _tolist)
    yield patch.object(dist, "all_gather_object", _own_object)
    for name in (
        "get_data_parallel_group_gloo",
        "get_expert_data_parallel_group_gloo",
    ):  # gloo needs the other processes
        yield patch.object(parallel_state, name, lambda *args, **kwargs: parallel_state.get_data_parallel_group())
    if find_spec("triton") is not None:
        from triton.runtime.jit import JITFunction

        yield patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: launches.run(kernel, *args, **kwargs))


def _own_object(found: list[Any], own: Any, group: Any = None) -> None:
    found[:] = [own] * len(found)
