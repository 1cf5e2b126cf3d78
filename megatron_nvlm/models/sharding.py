"""Which parameters are split over tensor-parallel ranks, along which axis: one table, used to mark, cut and join them."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """A parameter cut along `dim`; `blocks` are cut separately (gate and up projection of SwiGLU: 2)."""

    dim: int
    blocks: int = 1


# (pattern of a parameter's name within NVLMModel, how it is split); what matches nothing is whole on every rank.
SPLITS: tuple[tuple[str, Split], ...] = (
    (r"language_model\.embedding\.word_embeddings\.weight", Split(0)),
    (r"language_model\.output_layer\.weight", Split(0)),
    (r"language_model\.decoder\..*\.linear_(qkv|q|kv)\.(weight|bias)", Split(0)),
    (r"language_model\.decoder\..*\.linear_proj\.weight", Split(1)),
    (r"language_model\.decoder\..*\.linear_fc1\.weight", Split(0, blocks=2)),
    (r"language_model\.decoder\..*\.linear_fc2\.weight", Split(1)),
    (r"vision_projection\.mlp\.linear_fc1\.weight", Split(0)),
    (r"vision_projection\.mlp\.linear_fc2\.weight", Split(1)),
    (r"vision_projection\.linear\.weight", Split(0)),
)


def find_split(name: str) -> Split | None:
    """How the parameter of that name is split; None if it is whole on every rank."""
    for pattern, split in SPLITS:
        if re.fullmatch(pattern, name):
            return split
    return None


def cut(full: Tensor, split: Split | None, rank: int, ranks: int) -> Tensor:
    """The part of a whole tensor that a tensor-parallel rank holds."""
    if split is None or ranks == 1:
        return full
    parts = [block.chunk(ranks, split.dim)[rank] for block in full.chunk(split.blocks, split.dim)]
    return torch.cat(parts, split.dim)


def join(parts: list[Tensor], split: Split | None) -> Tensor:
    """The whole tensor from the parts of all tensor-parallel ranks, the inverse of `cut`."""
    if split is None or len(parts) == 1:
        return parts[0]
    blocks = [part.chunk(split.blocks, split.dim) for part in parts]
    return torch.cat([torch.cat([part[b] for part in blocks], split.dim) for b in range(split.blocks)], split.dim)


def full_shape(local: torch.Size, split: Split | None, ranks: int) -> list[int]:
    """Shape of the whole tensor from a rank's part."""
    shape = list(local)
    if split is not None:
        shape[split.dim] *= ranks
    return shape
