"""Decoder tokens and tiles of samples from the index alone: what packing, reports and schedules work with.

    tokens(sample) = num_text_tokens + sum over its images of tokens(grid)

Tokens of a grid come from sequence/image_layout.py, for the run's variant, tag format and tokenizer. A sample that would be
too long gives up tiles first (image/tile_budget.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_nvlm.data.shards.index import UNKNOWN_TOKENS, Index, TextCounting
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import MAX_PIXELS
from megatron_nvlm.image.tile_budget import SourceImage, grid_choices
from megatron_nvlm.image.tiling import Grid, TilingConfig
from megatron_nvlm.sequence.image_layout import lay_out_image
from megatron_nvlm.sequence.tag_ids import encode_tags
from megatron_nvlm.sequence.variants import Variant
from megatron_nvlm.text.conversation import TextPiece, encode_conversation, find_template, read_turns
from megatron_nvlm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextTokenCounter:
    """A record -> its decoder tokens that are no image's. Its description goes into the index.

    Raises:
        UserError: when made, if the tokenizer lacks a token of the template: no record could be counted.
    """

    tokenizer: Tokenizer
    template: str
    system: str | None

    def __post_init__(self) -> None:
        for name in find_template(self.template).special_tokens:
            self.tokenizer.special_id(name)

    def __call__(self, record: Mapping[str, Any]) -> int:
        """UserError if the record has no usable conversation."""
        images = record.get("images", [])
        turns = read_turns(record)
        pieces = encode_conversation(turns, len(images), self.tokenizer, find_template(self.template), self.system)
        return sum(len(piece.ids) for piece in pieces if isinstance(piece, TextPiece))

    @property
    def description(self) -> TextCounting:
        """What the index keeps, to know whether its counts are those of a run."""
        return TextCounting(self.tokenizer.fingerprint, self.template, self.system)


@dataclass(frozen=True)
class SampleSizes:
    """Of samples in order: decoder tokens and tiles, both as they enter the model."""

    tokens: np.ndarray
    """int64 [n]; 0 for samples that the index knows to be bad: too long, without a count, or with an image of no size."""
    tiles: np.ndarray
    """int64 [n]."""


class LengthCounter:
    """Tokens and tiles of samples under the settings of a run. Keeps the tokens of each grid it has met."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tiling: TilingConfig,
        variant: Variant,
        tokens_per_tile: int,
        sequence_length: int,
        template: str = "chatml",
        too_long: str = "reject",
    ) -> None:
        self.truncates = too_long == "truncate"
        self.tokenizer, self.tiling, self.variant, self.template = tokenizer, tiling, variant, template
        self.tokens_per_tile, self.sequence_length = tokens_per_tile, sequence_length
        self._tokens: dict[Grid, int] = {}

    def tokens_of_grid(self, grid: Grid) -> int:
        """Decoder tokens of an image on this grid: its tags, and those vision tokens that stand in the decoder."""
        if grid not in self._tokens:
            tags = encode_tags(grid, self.tiling, self.variant, self.tokenizer, find_template(self.template))
            self._tokens[grid] = len(lay_out_image(tags.ids, self.variant, self.tokens_per_tile).decoder_tokens)
        return self._tokens[grid]

    def most_tiles(self, index: Index, number: int) -> int:
        """Tiles of a sample that need not give any up; 0 if an image has no size."""
        sample = index.samples[number]
        first = int(sample["first_image"])
        images = index.images[first : first + int(sample["num_images"])].tolist()
        if any(not cols and not 0 < width * height <= MAX_PIXELS for width, height, cols, _ in images):
            return 0
        grids = next(grid_choices(_source_images(images), self.tiling))
        return sum(grid.num_pictures for grid in grids)

    def sizes(self, index: Index, numbers: Sequence[int] | np.ndarray) -> SampleSizes:
        """Sizes of samples by their numbers in the set. Text is as the index counted it (see `check_counts`)."""
        samples = index.samples[np.asarray(numbers, dtype=np.int64)]
        tokens = np.zeros(len(samples), dtype=np.int64)
        tiles = np.zeros(len(samples), dtype=np.int64)
        for place, sample in enumerate(samples):
            first = int(sample["first_image"])
            images = index.images[first : first + int(sample["num_images"])].tolist()
            tokens[place], tiles[place] = self._size(int(sample["num_text_tokens"]), images)
        return SampleSizes(tokens, tiles)

    def _size(self, text: int, images: Sequence[tuple[int, int, int, int]]) -> tuple[int, int]:
        no_size = any(not cols and not 0 < width * height <= MAX_PIXELS for width, height, cols, _ in images)
        if text == UNKNOWN_TOKENS or no_size:
            return 0, 0
        for grids in grid_choices(_source_images(images), self.tiling):
            tokens = text + sum(self.tokens_of_grid(grid) for grid in grids)
            if tokens <= self.sequence_length:
                return tokens, sum(grid.num_pictures for grid in grids)
        return (self.sequence_length, sum(grid.num_pictures for grid in grids)) if self.truncates else (0, 0)


def _source_images(images: Sequence[tuple[int, int, int, int]]) -> list[SourceImage]:
    """From rows of an index: width, height, and columns and rows of an image cut in advance."""
    return [SourceImage(width, height, Grid(cols, rows) if cols else None) for width, height, cols, rows in images]


def check_counts(index: Index, folder: object, wanted: TextCounting) -> None:
    """Refuse an index whose text was not counted as this run will tokenise it.

    Raises:
        UserError: naming the first difference.
    """
    if index.text is None:
        raise UserError(
            f"the index of {folder} does not know the text tokens of its samples, which packing needs; build the shards "
            "with the run's tokenizer (tools/build_shards.py)"
        )
    for field, what in (("tokenizer", "tokenizer"), ("template", "data.template"), ("system", "data.system")):
        theirs, ours = getattr(index.text, field), getattr(wanted, field)
        if theirs != ours:
            raise UserError(
                f"the index of {folder} was counted with {what} {theirs!r} and this run has {ours!r}; build the shards "
                "with the run's"
            )
