"""What a conversion reads from: named tensors whose sizes are known before any is read."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_nvlm.models.weight_rows import CensusError, Row, check_their_names


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a tensor that was not read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def parameters(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of its numbers."""
        return self.parameters * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Length of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.num_bytes // max(self.rows, 1)

    def meta(self) -> Tensor:
        """A tensor like it without numbers."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @staticmethod
    def of(tensor: Tensor) -> "TensorInfo":
        """What describes a tensor."""
        return TensorInfo(tuple(tensor.shape), tensor.dtype)


def in_pieces(tensor: Tensor, most_numbers: int) -> Sequence[Tensor]:
    """Views of a tensor along its first axis, each of at most `most_numbers` numbers (a row at least); a scalar as it is."""
    if not tensor.dim() or not len(tensor):
        return [tensor]
    return tensor.split(max(1, most_numbers // max(1, tensor[0].numel())))


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8 [bytes]."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class TensorSource(Protocol):
    """A folder, a checkpoint, or another view of one."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""


class AsOurs:
    """A folder's tensors under our names and layouts, each made when it is read.

    Raises:
        CensusError: when made, unless the rows and the source match name for name and shapes make sense.
    """

    def __init__(self, rows: Sequence[Row], theirs: TensorSource, where: str = "the folder") -> None:
        check_their_names(rows, theirs.infos, where)
        self._rows = {row.ours: row for row in rows}
        self._theirs = theirs
        self.infos: dict[str, TensorInfo] = {}
        impossible: list[str] = []
        for row in rows:
            parts = {name: theirs.infos[name].meta() for name in row.theirs}
            try:
                self.infos[row.ours] = TensorInfo.of(row.transform.to_ours(list(parts.values())))
            except (RuntimeError, IndexError, ValueError):  # torch's, for a shape that cannot be taken apart
                shapes = " and ".join(f"{name} {list(part.shape)}" for name, part in parts.items())
                impossible.append(f"{shapes} cannot make {row.ours}")
        if impossible:
            raise CensusError(
                f"{where} has {len(impossible)} weights of impossible shapes: {impossible[0]}; is this another model?",
                impossible,
            )

    def read(self, name: str) -> Tensor:
        """One of our tensors."""
        row = self._rows[name]
        return row.transform.to_ours([self._theirs.read(part) for part in row.theirs])


class Made:
    """Tensors that a function makes when they are read."""

    def __init__(self, infos: dict[str, TensorInfo], make: Callable[[str], Tensor]) -> None:
        self.infos = infos
        self._make = make

    def read(self, name: str) -> Tensor:
        """One of them."""
        return self._make(name)


class FirstRows:
    """A source of which some tensors have more rows than are wanted: zeros that fill a vocabulary up."""

    def __init__(self, source: TensorSource, wanted: dict[str, int]) -> None:
        self._source, self._wanted = source, wanted
        self.infos = {
            name: TensorInfo((wanted[name], *info.shape[1:]), info.dtype) if name in wanted else info
            for name, info in source.infos.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, cut."""
        tensor = self._source.read(name)
        return tensor[: self._wanted[name]] if name in self._wanted else tensor


class Joined:
    """Several sources that have no name in common."""

    def __init__(self, sources: Sequence[TensorSource]) -> None:
        self._source_of = {name: source for source in sources for name in source.infos}
        self.infos = {name: source.infos[name] for name, source in self._source_of.items()}

    def read(self, name: str) -> Tensor:
        """A tensor of the source that has it."""
        return self._source_of[name].read(name)
