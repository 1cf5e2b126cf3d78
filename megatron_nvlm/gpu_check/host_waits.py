"""Finds what makes the host wait for the device, with the line of code that asks for it.

While the host waits it launches nothing, and the device then waits for the host. What a GPU would make of each operation is
read from its name, devices and arguments, so tensors may be fake, or lie on a pretended GPU.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_nvlm.gpu_check.pretended_gpu import listening

PACKAGES = ("megatron_nvlm", "megatron/core")
"""Whose lines are named."""
_SIZE_UNKNOWN = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
    "aten::equal",
}
"""Operations whose result has a size, or is a value, that the host must know."""
_BY_INDEX = {"aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}


class Wait(NamedTuple):
    """A kind of wait at a place."""

    what: str
    place: str
    """FILE:LINE of the innermost line of PACKAGES."""


class HostWaits(TorchDispatchMode):
    """Within it, waits are counted in `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Wait] = Counter()
        self._pinned: set[int] = set()
        """Storages of the host that may be copied without a wait."""
        self._within = ExitStack()

    @property
    def total(self) -> int:
        """Of all kinds at all places."""
        return sum(self.found.values())

    def take(self) -> Counter[Wait]:
        """What was found since the last call."""
        taken, self.found = self.found, Counter()
        return taken

    def mark_pinned(self, tensor: Tensor) -> None:
        """Count the memory of a tensor, and of its views, as pinned; what is pinned within the block is known."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._pinned:
            self._pinned.add(storage._cdata)
            weakref.finalize(storage, self._pinned.discard, storage._cdata)

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def note(self, what: str) -> None:
        """Count one, asked for by the lines that run now."""
        self.found[Wait(what, calling_line())] += 1

    def __enter__(self) -> "HostWaits":
        self._within.enter_context(listening(self.note))
        self._within.enter_context(_ReadsOneByOne())
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, traceback)
        self._within.close()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.name()
        what = self._wait_of(name, args, kwargs)
        if what:
            self.note(what)
        made = function(*args, **kwargs)
        if name == "aten::_pin_memory" or kwargs.get("pin_memory"):
            self.mark_pinned(made)
        return made

    def _wait_of(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """What the host waits for in an operation; nothing if it does not."""
        if name == "aten::_local_scalar_dense" and _on_device(args[0]):
            return "a value is read"
        if name in _SIZE_UNKNOWN and _on_device(args[0]):
            return f"the size of a result ({name.partition('::')[2].partition('.')[0]})"
        if name in _BY_INDEX and _on_device(args[0]):
            fills = len(args) > 2 and args[2].dim() == 0 and not _on_device(args[2])  # torch fills by the mask then
            return "" if fills else _wait_of_index([index for index in args[1] if index is not None])
        if name == "aten::_to_copy" and isinstance(args[0], Tensor):
            to = kwargs.get("device")
            return self._wait_of_copy(args[0], to, kwargs.get("non_blocking", False)) if to is not None else ""
        if name == "aten::copy_":
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            if non_blocking and _on_device(args[1]) and self._is_pinned(args[0]):
                return ""
            return self._wait_of_copy(args[1], args[0].device, non_blocking)
        return ""

    def _wait_of_copy(self, source: Tensor, to: torch.device, non_blocking: bool) -> str:
        if source.device.type == torch.device(to).type or source.numel() == 0:
            return ""
        if _on_device(source):
            return "a copy to the host"
        if not non_blocking:
            return "a copy to the device"
        return "" if self._is_pinned(source) else "a copy to the device of memory that is not pinned"


class _ReadsOneByOne(TorchFunctionMode):
    """`torch.tensor` of a list of tensors reads each of them, out of sight of modes: here by `item`, in their sight."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.tensor:
            args = (_read(args[0]), *args[1:])
        return function(*args, **(kwargs or {}))


def _read(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_read(one) for one in value]
    return value.item() if _on_device(value) and value.dim() == 0 else value


def _on_device(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == "cuda"


def _wait_of_index(indices: Sequence[Tensor]) -> str:
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return "the size of a result (index by a mask)"
    if any(index.device.type == "cpu" and index.dim() for index in indices):
        return "a copy to the device of an index"
    return ""


def calling_line() -> str:
    """FILE:LINE of the innermost line of PACKAGES that runs now; of one in core, our line that led to it as well."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = _path_in_packages(frame.f_code.co_filename)
        if path and (not found or path.startswith(PACKAGES[0])):
            found.append(f"{path}:{frame.f_lineno}")
            if path.startswith(PACKAGES[0]):
                break
        frame = frame.f_back
    return " < ".join(found) or "a thread of the backward pass, or a caller elsewhere"


def _path_in_packages(file_name: str) -> str:
    if Path(file_name).parent == Path(__file__).parent:
        return ""
    for package in PACKAGES:
        before, found, after = file_name.rpartition(f"/{package}/")
        if found:
            return f"{package}/{after}"
    return ""
