"""What a step does on one rank: bytes that live on the device, operations, and messages to other ranks."""

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK_BYTES = 512
"""Torch's allocator rounds to it."""
_NO_KERNEL = frozenset(
    "view _unsafe_view reshape transpose t permute slice select split split_with_sizes unsqueeze squeeze expand as_strided "
    "detach alias empty empty_like empty_strided new_empty new_empty_strided unbind _reshape_alias lift_fresh set_ resize_ "
    "_local_scalar_dense is_pinned unsafe_split device promote_types".split()
)
"""Operations that launch nothing."""
# Of n bytes, what a rank of a ring of N sends: factor -> (N - 1) / N times it.
_RING = {"allreduce": 2, "allgather": 1, "reduce_scatter": 1, "alltoall": 1, "broadcast": 1}


class Message(NamedTuple):
    """A kind of collective in a group."""

    operation: str
    group: str
    """tensor, pipeline, data, or another of `groups`."""
    ranks: int


class Ledger(TorchDispatchMode):
    """Counts within its `with` block.

    Args:
        groups: names of process groups, by torch's own name of them.
    """

    def __init__(self, groups: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.groups = dict(groups or {})
        self.live_bytes = self.peak_bytes = 0
        self.operations: Counter[str] = Counter()
        self.messages: Counter[Message] = Counter()
        self.sent_bytes: Counter[Message] = Counter()
        self._storages: dict[int, int] = {}

    def start_step(self) -> None:
        """Count from here on; the peak begins at what lives now."""
        self.peak_bytes = self.live_bytes
        for counter in (self.operations, self.messages, self.sent_bytes):
            counter.clear()

    def hold(self, tensor: Any) -> None:
        """Count a tensor's memory for as long as it lives."""
        if not isinstance(tensor, Tensor) or tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        self._storages[key] = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self.live_bytes += self._storages[key]
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live_bytes -= self._storages.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, _, rest = function.name().partition("::")
        name = rest.partition(".")[0]
        if space == "c10d":
            self._note_message(name, args)
        elif name not in _NO_KERNEL:
            self.operations[name] += 1
        made = function(*args, **kwargs)
        pytree.tree_map_only(Tensor, self.hold, made)
        return made

    def _note_message(self, name: str, args: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        operation = name.strip("_").removesuffix("_base").replace("_into_tensor", "").replace("_tensor", "")
        operation = operation.removesuffix("_coalesced")
        group = next((found for leaf in args if (found := _as_group(leaf)) is not None), None)
        if group is None or not tensors or operation == "barrier":
            return
        ranks = group.size()
        name = self.groups.get(group.group_name, "other")
        # Of two stages, core sends back over the group of all ranks.
        message = Message(operation, "pipeline" if operation in ("send", "recv") else name, ranks)
        self.messages[message] += 1
        whole = max(tensor.numel() * tensor.element_size() for tensor in tensors)
        if operation in _RING:
            self.sent_bytes[message] += _RING[operation] * whole * (ranks - 1) // ranks
        elif operation in ("send", "gather"):
            self.sent_bytes[message] += whole


def _as_group(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
        found: dist.ProcessGroup = dist.ProcessGroup.unbox(value)
        return found
    return None
