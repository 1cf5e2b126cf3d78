"""Saved inputs of a Hugging Face model as one of our micro-batches. Shapes: b samples, r rows, t tiles, c context tokens."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_nvlm.errors import UserError
from megatron_nvlm.regular_files import check_regular
from megatron_nvlm.sequence.assemble import IGNORED_LABEL
from megatron_nvlm.sequence.micro_batch import MicroBatch

PLACE_KEY = "img_context_token_id"


@dataclass(frozen=True)
class Case:
    """One call of a model."""

    name: str
    tensors: dict[str, Tensor]
    place_id: int | None
    """The id that stands where a vision token goes."""

    @property
    def real(self) -> Tensor:
        """[b, r] rows that are no padding."""
        ids = self.tensors["input_ids"]
        return self.tensors.get("attention_mask", torch.ones_like(ids)).bool()

    @property
    def has_labels(self) -> bool:
        """Whether there is a loss."""
        return "labels" in self.tensors


def read_cases(path: Path) -> list[Case]:
    """The cases of a file, by name; UserError if there are none."""
    check_regular(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no file of saved inputs ({error})") from error
    place = int(tensors[PLACE_KEY][0]) if PLACE_KEY in tensors else None
    names = sorted(key.removesuffix(".input_ids") for key in tensors if key.endswith(".input_ids"))
    if not names:
        raise UserError(f"{path} has no tensor CASE.input_ids; python -m tools.score --help says what it needs")
    return [
        Case(name, {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}, place)
        for name in names
    ]


def to_micro_batch(case: Case, tokens_per_tile: int, tile_size: int, has_context: bool) -> MicroBatch:
    """The case's samples one after the other, padding left out.

    Args:
        has_context: whether the model has cross-attention.

    Raises:
        UserError: tiles and places for vision tokens do not fit each other.
    """
    tensors, real = case.tensors, case.real
    ids = tensors["input_ids"]
    tiles = tensors.get("pixel_values", torch.zeros(0, 3, tile_size, tile_size))
    if "image_flags" in tensors:
        tiles = tiles[tensors["image_flags"].flatten().bool()]
    first_token = _first_vision_tokens(case, len(ids), tokens_per_tile)
    index = _decoder_index(case, first_token)
    in_context = has_context and "context_intervals" in tensors
    if not in_context and int((index >= 0).sum()) != len(tiles) * tokens_per_tile:
        raise UserError(
            f"{case.name}: {len(tiles)} tiles make {len(tiles) * tokens_per_tile} vision tokens, and input_ids has "
            f"{int((index >= 0).sum())} places for them"
        )
    lengths = real.sum(1).tolist()
    context_ids, context_index, intervals = _context(case, first_token, in_context, has_context)
    labels = _next_labels(case)
    return MicroBatch(
        tokens=torch.where(index >= 0, 0, ids)[real],
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        labels=labels,
        loss_mask=(labels != IGNORED_LABEL).float(),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        decoder_vision_index=index[real],
        context_tokens=context_ids,
        context_vision_index=context_index,
        context_intervals=intervals,
        tiles=tiles,
        keys=(case.name,),
        num_tiles=len(tiles),
    )


def _first_vision_tokens(case: Case, samples: int, tokens_per_tile: int) -> Tensor:
    """[b, 1] number of each sample's first vision token in the micro-batch."""
    counts = case.tensors.get("num_tiles", torch.zeros(samples, dtype=torch.long)).flatten() * tokens_per_tile
    return (counts.cumsum(0) - counts)[:, None]


def _decoder_index(case: Case, first_token: Tensor) -> Tensor:
    """[b, r] number of the vision token that stands in a row; -1 for text."""
    given = case.tensors.get("vision_index")
    if given is not None:
        return torch.where(given >= 0, given + first_token, -1)
    ids = case.tensors["input_ids"]
    places = (
        (ids == case.place_id) & case.real if case.place_id is not None else torch.zeros_like(ids, dtype=torch.bool)
    )
    return torch.where(places, (places.flatten().cumsum(0) - 1).view_as(ids), -1)


def _context(case: Case, first_token: Tensor, in_context: bool, has_context: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and vision tokens of the context, and what each row sees of it; samples one after the other."""
    rows = int(case.real.sum())
    if not in_context:
        filler = torch.zeros(1 if has_context else 0, dtype=torch.long)
        return filler, filler - 1, torch.zeros(rows, 2, dtype=torch.int32)
    tensors = case.tensors
    ids, index, intervals = (tensors[f"context_{name}"] for name in ("input_ids", "vision_index", "intervals"))
    width = ids.shape[1]
    first_row = (torch.arange(len(ids)) * width)[:, None, None]
    seen = intervals[..., 1:] > intervals[..., :1]
    moved = torch.where(seen, intervals + first_row, 0)[case.real]
    numbers = torch.where(index >= 0, index + first_token, -1)
    return torch.where(index >= 0, 0, ids).flatten(), numbers.flatten(), moved.to(torch.int32)


def _next_labels(case: Case) -> Tensor:
    """[rows] the next token where it is a target; Hugging Face's labels stand at the token itself."""
    real = case.real
    if not case.has_labels:
        return torch.full((int(real.sum()),), IGNORED_LABEL)
    labels = [row[kept] for row, kept in zip(case.tensors["labels"], real, strict=True)]
    return torch.cat([torch.cat([row[1:], row.new_full((1,), IGNORED_LABEL)]) for row in labels])
