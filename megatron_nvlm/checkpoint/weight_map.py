"""One table row names a weight here and in a Hugging Face folder, and says how the one becomes the other.

Rows are read in the direction Hugging Face -> ours when weights are loaded; transforms are linear, so the same rows also
carry gradients. `*` stands for a layer's number on both sides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_nvlm.errors import UserError

Transform = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Row:
    """`ours` is one parameter's name; `theirs` the tensors that make it, in the order that `to_ours` takes them."""

    ours: str
    theirs: tuple[str, ...]
    to_ours: Transform


def direct(tensors: Sequence[Tensor]) -> Tensor:
    """The same tensor."""
    return tensors[0]


def drop_first_axis(tensors: Sequence[Tensor]) -> Tensor:
    """[1, ...] -> [...]."""
    return tensors[0].squeeze(0)


def gate_and_up(tensors: Sequence[Tensor]) -> Tensor:
    """gate [f, h] and up [f, h] -> [2 f, h], gate first."""
    return torch.cat(list(tensors))


def group_qkv(groups: int) -> Transform:
    """q, k, v -> one tensor ordered by key/value group: the group's queries, its key, its value."""

    def transform(tensors: Sequence[Tensor]) -> Tensor:
        parts = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(parts, dim=1).flatten(0, 1)

    return transform


def interleave_heads(heads: int, head_size: int) -> Transform:
    """InternViT's [3][stored heads][d] rows -> [real heads][3][d]; heads past the real ones are padding and must be 0."""

    def transform(tensors: Sequence[Tensor]) -> Tensor:
        rows = tensors[0].reshape(3, -1, head_size, *tensors[0].shape[1:])
        _refuse_used_padding(rows[:, heads:])
        return rows[:, :heads].transpose(0, 1).flatten(0, 2)

    return transform


def real_width(width: int, axis: int) -> Transform:
    """The first `width` entries along `axis`; the rest belongs to padding heads and must be 0."""

    def transform(tensors: Sequence[Tensor]) -> Tensor:
        stored = tensors[0]
        _refuse_used_padding(stored.narrow(axis, width, stored.shape[axis] - width))
        return stored.narrow(axis, 0, width)

    return transform


def _refuse_used_padding(padding: Tensor) -> None:
    if padding.numel() and bool((padding != 0).any()):
        raise UserError(
            "the vision model's padding heads hold numbers other than zero, so dropping them would change its output; "
            "convert the folder from weights whose padding heads are zero"
        )


def convert(rows: Sequence[Row], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of `theirs` under our names and layouts.

    Raises:
        UserError: a tensor that a row needs is missing, or tensors are left that no row reads.
    """
    converted: dict[str, Tensor] = {}
    unread = set(theirs)
    for row in rows:
        missing = [name for name in row.theirs if name not in theirs]
        if missing:
            raise UserError(f"the weights lack {', '.join(missing)}, which make {row.ours}; is this another model?")
        converted[row.ours] = row.to_ours([theirs[name] for name in row.theirs]).contiguous()
        unread -= set(row.theirs)
    if unread:
        raise UserError(
            f"{len(unread)} tensors of the weights belong to nothing in this model, {sorted(unread)[0]} among them; "
            "is this another model?"
        )
    return converted


def expand(rows: Sequence[Row], num_layers: int) -> list[Row]:
    """Rows with `*` for each layer, others as they are."""
    expanded = []
    for row in rows:
        for layer in range(num_layers if "*" in row.ours else 1):
            number = str(layer)
            theirs = tuple(name.replace("*", number) for name in row.theirs)
            expanded.append(Row(row.ours.replace("*", number), theirs, row.to_ours))
    return expanded
