"""Which parameters are split over tensor-parallel ranks, along which axis: one table, used to mark, cut and join them."""

import re
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nvlm.models.padding import Padding


@dataclass(frozen=True)
class Split:
    """A parameter cut along `dim`; `blocks` are cut separately (gate and up projection of SwiGLU: 2)."""

    dim: int
    blocks: int = 1
    padding: Padding | None = None
    """Zeros that stand after the whole tensor before it is cut, in units of heads, or of rows of the vocabulary."""


# (pattern of a parameter's name within NVLMModel, how it is split); what matches nothing is whole on every rank.
SPLITS: tuple[tuple[str, Split], ...] = (
    (r"language_model\.decoder\..*\.linear_(qkv|q|kv)\.(weight|bias)", Split(0)),
    (r"language_model\.decoder\..*\.linear_proj\.weight", Split(1)),
    (r"language_model\.decoder\..*\.linear_fc1\.weight", Split(0, blocks=2)),
    (r"language_model\.decoder\..*\.linear_fc2\.weight", Split(1)),
    (r"language_model\.decoder\..*\.linear_(qkv|fc1)\.adapters\.\w+\.lora_b", Split(0)),
    (r"language_model\.decoder\..*\.linear_(proj|fc2)\.adapters\.\w+\.lora_a", Split(1)),
    (r"vision_projection\.mlp\.linear_fc1\.weight", Split(0)),
    (r"vision_projection\.mlp\.linear_fc2\.weight", Split(1)),
    (r"vision_projection\.linear\.weight", Split(0)),
)


# One row for each id; zeros fill up to a multiple of the ranks.
VOCABULARY_SPLITS: tuple[tuple[str, Split], ...] = (
    (r"language_model\.embedding\.word_embeddings\.weight", Split(0)),
    (r"language_model\.output_layer\.weight", Split(0)),
)


# The encoder's, where it is tensor parallel; elsewhere each rank that has it holds it whole.
VISION_SPLITS_BY_HEAD: tuple[tuple[str, Split], ...] = (
    (r"vision_model\.decoder\..*\.linear_qkv\.(weight|bias)", Split(0)),
    (r"vision_model\.decoder\..*\.linear_proj\.weight", Split(1)),
    (r"vision_model\.decoder\..*\.full_[qk]_layernorm\.weight", Split(0)),
)
VISION_SPLITS: tuple[tuple[str, Split], ...] = (
    (r"vision_model\.decoder\..*\.linear_fc1\.(weight|bias)", Split(0)),
    (r"vision_model\.decoder\..*\.linear_fc2\.weight", Split(1)),
)


def find_split(name: str, vision_heads: Padding | None = None, vocabulary: Padding | None = None) -> Split | None:
    """How the parameter of that name is split; None if it is whole on every rank.

    Args:
        vision_heads: of a tensor-parallel encoder; None where each rank holds the encoder whole.
        vocabulary: how its rows are filled up; None where the ranks divide them.
    """
    for pattern, split in VOCABULARY_SPLITS:
        if re.fullmatch(pattern, name):
            return replace(split, padding=vocabulary)
    for pattern, split in SPLITS:
        if re.fullmatch(pattern, name):
            return split
    if vision_heads is not None:
        for pattern, split in VISION_SPLITS_BY_HEAD:
            if re.fullmatch(pattern, name):
                return replace(split, padding=vision_heads)
        for pattern, split in VISION_SPLITS:
            if re.fullmatch(pattern, name):
                return split
    return None


def cut(full: Tensor, split: Split | None, rank: int, ranks: int) -> Tensor:
    """The part of a whole tensor that a tensor-parallel rank holds."""
    if split is None:
        return full
    if split.padding is not None:
        full = split.padding.pad(full, split.dim)
    parts = [block.chunk(ranks, split.dim)[rank] for block in full.chunk(split.blocks, split.dim)]
    return torch.cat(parts, split.dim)


def join(parts: list[Tensor], split: Split | None) -> Tensor:
    """The whole tensor from the parts of all tensor-parallel ranks, the inverse of `cut`."""
    if split is None:
        return parts[0]
    blocks = [part.chunk(split.blocks, split.dim) for part in parts]
    full = torch.cat([torch.cat([part[b] for part in blocks], split.dim) for b in range(split.blocks)], split.dim)
    return full if split.padding is None else split.padding.unpad(full, split.dim)


def gather_parts(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The parts of all ranks of a group, in order, on each of them."""
    if group.size() == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


def full_shape(local: torch.Size, split: Split | None, ranks: int) -> list[int]:
    """Shape of the whole tensor from a rank's part."""
    shape = list(local)
    if split is not None:
        shape[split.dim] *= ranks
        if split.padding is not None:
            shape[split.dim] = shape[split.dim] // split.padding.padded * split.padding.real
    return shape
