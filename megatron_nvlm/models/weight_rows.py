"""One table row names a weight here and in a Hugging Face folder, and says how the one becomes the other, both ways.

Transforms only move numbers, so the same rows carry gradients, and a way there and back changes no bit. `*` stands for a
layer's number on both sides.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from megatron_nvlm.errors import UserError


class Transform(ABC):
    """Turns tensors of a folder into one of ours, and back."""

    @abstractmethod
    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        """One of our tensors from theirs, in the row's order."""

    @abstractmethod
    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """Their tensors from ours; the inverse of `to_ours`."""

    def for_part(self, ranks: int) -> "Transform | None":
        """What turns each rank's equal part of their tensors into its part of ours; None if parts do not fit together."""
        return None


@dataclass(frozen=True)
class Row:
    """`ours` is one parameter's name; `theirs` the tensors that make it, in the order that the transform takes them."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform


class Direct(Transform):
    """The same tensor."""

    @override
    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    @override
    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        return [ours]

    @override
    def for_part(self, ranks: int) -> Transform:
        return self


class DropFirstAxis(Transform):
    """[1, ...] <-> [...]."""

    @override
    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].squeeze(0)

    @override
    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        return [ours[None]]


class GateAndUp(Transform):
    """gate [f, h] and up [f, h] <-> [2 f, h], gate first."""

    @override
    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))

    @override
    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        return list(ours.chunk(2))

    @override
    def for_part(self, ranks: int) -> Transform:
        return self


@dataclass(frozen=True)
class ByGroup(Transform):
    """Tensors of rows by head <-> one tensor ordered by key/value group: its queries, its key, its value.

    Args:
        groups: key/value groups.
        heads: of each tensor, how many a group has: (queries per group, 1, 1), or (1, 1) for keys and values alone.
    """

    groups: int
    heads: tuple[int, ...]

    @override
    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        parts = [tensor.reshape(self.groups, -1, *tensor.shape[1:]) for tensor in tensors]  # [groups, rows, ...]
        return torch.cat(parts, dim=1).flatten(0, 1)  # [all rows, ...]

    @override
    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        by_group = ours.reshape(self.groups, -1, *ours.shape[1:])  # [groups, rows of all tensors, ...]
        head = by_group.shape[1] // sum(self.heads)
        return [part.flatten(0, 1) for part in by_group.split([head * count for count in self.heads], dim=1)]

    @override
    def for_part(self, ranks: int) -> Transform:
        return replace(self, groups=self.groups // ranks)


@dataclass(frozen=True)
class InterleaveHeads(Transform):
    """InternViT's [3][stored heads][d] rows <-> [real heads][3][d]; heads past the real ones are padding and must be 0."""

    heads: int
    head_size: int
    stored_heads: int

    @override
    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        rows = tensors[0].reshape(3, -1, self.head_size, *tensors[0].shape[1:])  # [3, stored heads, d, ...]
        _refuse_used_padding(rows[:, self.heads :])
        return rows[:, : self.heads].transpose(0, 1).flatten(0, 2)  # [heads * 3 * d, ...]

    @override
    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        rows = ours.reshape(self.heads, 3, self.head_size, *ours.shape[1:]).transpose(0, 1)  # [3, heads, d, ...]
        return [_with_zeros(rows, 1, self.stored_heads).flatten(0, 2)]  # [3 * stored heads * d, ...]


@dataclass(frozen=True)
class RealWidth(Transform):
    """The first `width` entries along `axis`; the rest, up to `stored`, belongs to padding heads and must be 0."""

    width: int
    axis: int
    stored: int

    @override
    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        there = tensors[0]
        _refuse_used_padding(there.narrow(self.axis, self.width, there.shape[self.axis] - self.width))
        return there.narrow(self.axis, 0, self.width)

    @override
    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        return [_with_zeros(ours, self.axis, self.stored)]


def _with_zeros(tensor: Tensor, axis: int, length: int) -> Tensor:
    missing = list(tensor.shape)
    missing[axis] = length - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(missing)], axis) if missing[axis] else tensor


def _refuse_used_padding(padding: Tensor) -> None:
    if padding.numel() and not padding.is_meta and bool((padding != 0).any()):
        raise UserError(
            "the vision model's padding heads hold numbers other than zero, so dropping them would change its output; "
            "convert the folder from weights whose padding heads are zero"
        )


class CensusError(UserError):
    """Names on the two sides do not match; `findings` lists every one."""

    def __init__(self, sentence: str, findings: Sequence[str]) -> None:
        super().__init__(sentence)
        self.findings = list(findings)


def check_their_names(rows: Sequence[Row], names: Iterable[str], where: str = "the weights") -> None:
    """Every tensor of theirs is read by one row, and every row finds its tensors.

    Raises:
        CensusError: with all that are missing or belong to nothing.
    """
    wanted = [name for row in rows for name in row.theirs]
    there = set(names)
    missing = [f"missing: {name} (makes {row.ours})" for row in rows for name in row.theirs if name not in there]
    unread = [f"unknown: {name}" for name in sorted(there - set(wanted))]
    _raise_findings(missing, unread, where)


def check_our_names(rows: Sequence[Row], names: Iterable[str], where: str = "the checkpoint") -> None:
    """Every parameter of ours stands in one row, and every row finds its parameter; CensusError with all others."""
    there = set(names)
    missing = [f"missing: {row.ours}" for row in rows if row.ours not in there]
    unread = [f"unknown: {name}" for name in sorted(there - {row.ours for row in rows})]
    _raise_findings(missing, unread, where)


def _raise_findings(missing: list[str], unread: list[str], where: str) -> None:
    if missing:
        first = missing[0].removeprefix("missing: ")
        raise CensusError(f"{where} lacks {len(missing)} tensors, {first} among them; is this another model?", missing)
    if unread:
        first = unread[0].removeprefix("unknown: ")
        raise CensusError(
            f"{len(unread)} tensors of {where} belong to nothing in this model, {first} among them; is this another model?",
            unread,
        )


def convert(rows: Sequence[Row], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of `theirs` under our names and layouts; CensusError unless the two sides match."""
    check_their_names(rows, theirs)
    return {row.ours: row.transform.to_ours([theirs[name] for name in row.theirs]).contiguous() for row in rows}


def convert_to_theirs(rows: Sequence[Row], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of `ours` under their names and layouts; CensusError unless the two sides match."""
    check_our_names(rows, ours)
    converted: dict[str, Tensor] = {}
    for row in rows:
        tensors = row.transform.to_theirs(ours[row.ours])
        converted |= {name: tensor.contiguous() for name, tensor in zip(row.theirs, tensors, strict=True)}
    return converted


def expand(rows: Sequence[Row], layers: Iterable[int]) -> list[Row]:
    """Rows with `*` for each layer, others as they are."""
    numbers = list(layers)
    expanded = []
    for row in rows:
        if "*" not in row.ours:
            expanded.append(row)
            continue
        for number in map(str, numbers):
            theirs = tuple(name.replace("*", number) for name in row.theirs)
            expanded.append(Row(row.ours.replace("*", number), theirs, row.transform))
    return expanded
