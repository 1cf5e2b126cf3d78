"""One function per arrow: a stored sample -> pictures -> sequence. `SamplePipeline` is all of them, with its settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from megatron_nvlm.data.shards.records import RawSample, is_whole
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import decode_image, write_array
from megatron_nvlm.image.tile_budget import SourceImage, grid_choices
from megatron_nvlm.image.tiling import Grid, TilingConfig, cut_tiles
from megatron_nvlm.sequence.assemble import AssembledSample, assemble, cut_to
from megatron_nvlm.sequence.image_layout import ImageLayout, lay_out_image
from megatron_nvlm.sequence.tag_ids import encode_tags
from megatron_nvlm.sequence.variants import Variant
from megatron_nvlm.text.conversation import Turn, encode_conversation, find_template, read_turns
from megatron_nvlm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreparedSample:
    """What a micro-batch takes from one sample."""

    key: str
    sequence: AssembledSample
    tiles: np.ndarray
    """uint8 [tiles, 3, S, S]: all of the sample's, or the part that was asked for."""
    source: str
    adjustment: str = ""
    """What was given up so that it fits, a name of ADJUSTMENTS; nothing by default."""
    dataset: int = 0
    """Which of the sets it is from."""


ADJUSTMENTS = ("fewer_tiles", "truncated")
"""What a sample that is too long can give up: tiles of its images, then, if the run allows it, the end of its text."""
TOO_LONG = ("reject", "truncate")
"""Values of data.too_long."""
AllocateTiles = Callable[[int, int], np.ndarray]
"""(tiles, pixels along an edge) -> uint8 [tiles, 3, S, S] to be filled."""


def new_tiles(tiles: int, tile_size: int) -> np.ndarray:
    """Memory of this process."""
    return np.empty((tiles, 3, tile_size, tile_size), dtype=np.uint8)


class BadSample(UserError):
    """A sample that cannot be used; `kind` groups such samples in counts."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class _StoredImage:
    """An image of a sample, by number: stored whole (its member, its size, and decoded if that was unknown) or on a grid."""

    number: int
    member: str = ""
    size: tuple[int, int] = (0, 0)
    picture: Image.Image | None = None
    grid: Grid | None = None


@dataclass(frozen=True)
class SamplePipeline:
    """Settings of the arrows. Building the same sample twice gives the same sequence and pixels."""

    tokenizer: Tokenizer
    tiling: TilingConfig
    variant: Variant
    tokens_per_tile: int
    sequence_length: int
    template: str
    system: str | None
    too_long: str = "reject"
    """What becomes of a sample that is too long with its fewest tiles: a name of TOO_LONG."""

    def prepare(
        self,
        raw: RawSample,
        open_answer: bool = False,
        allocate: AllocateTiles = new_tiles,
        sizes: Sequence[tuple[int, int]] | None = None,
        part: tuple[int, int] | None = None,
    ) -> PreparedSample:
        """Everything in one go.

        Args:
            open_answer: leave the last answer out and end where the model is to write it.
            allocate: gives the memory for the tiles.
            sizes: (width, height) of each image, upright, as the index knows them; (0, 0) where it does not. Images of
                unknown size are decoded to learn it.
            part: range [start, end) of the sample's tiles to decode; all by default. What has no tile in it stays unread.

        Raises:
            BadSample: with the kind of fault: record, image, conversation, too_long or index.
        """
        images = self._step("record", number_of_images, raw)
        turns = self._step("conversation", read_turns, raw.record)
        if open_answer and turns[-1].role == "assistant":
            turns = turns[:-1]
        stored = [
            self._step("image", self._find_image, raw, image, sizes[image] if sizes else (0, 0))
            for image in range(images)
        ]
        choices = grid_choices([SourceImage(image.size[0], image.size[1], image.grid) for image in stored], self.tiling)
        adjustment = ""
        while (grids := self._step("image", next, choices, None)) is not None:
            fewest, sequence = grids, self._step("conversation", self._assemble, turns, grids, open_answer)
            if len(sequence.tokens) <= self.sequence_length:
                break
            adjustment = "fewer_tiles"
        else:
            sequence, adjustment = self._truncate(sequence, open_answer), "truncated"
        tiles = self._decode(raw, stored, fewest, part or (0, sequence.num_tiles), allocate)
        return PreparedSample(raw.key, sequence, tiles, str(raw.record.get("source", "unknown")), adjustment)

    def _truncate(self, sequence: AssembledSample, open_answer: bool) -> AssembledSample:
        cut = cut_to(sequence, self.sequence_length) if self.too_long == "truncate" and not open_answer else None
        if cut is not None:
            return cut
        raise BadSample(
            "too_long", f"it has {len(sequence.tokens)} tokens, over data.sequence_length of {self.sequence_length}"
        )

    @staticmethod
    def _step(kind: str, function, *args):  # type: ignore[no-untyped-def]
        try:
            return function(*args)
        except BadSample:
            raise
        except UserError as error:
            raise BadSample(kind, str(error)) from error

    def _find_image(self, raw: RawSample, image: int, size: tuple[int, int]) -> "_StoredImage":
        """What is known of an image without decoding it, if its size is known."""
        whole = [name for name in raw.pictures if name.split(".")[0] == str(image) and is_whole(name)]
        if not whole:
            return _StoredImage(image, grid=stored_grid(raw, image))
        if all(size):
            return _StoredImage(image, whole[0], size)
        picture = self._decode_member(raw, whole[0])
        return _StoredImage(image, whole[0], picture.size, picture)

    def _decode(
        self,
        raw: RawSample,
        stored: Sequence["_StoredImage"],
        grids: Sequence[Grid],
        part: tuple[int, int],
        allocate: AllocateTiles,
    ) -> np.ndarray:
        """Tiles [start, end) of a sample."""
        start, end = part
        tiles = allocate(end - start, self.tiling.tile_size)
        first = 0
        for image, grid in zip(stored, grids, strict=True):
            last = first + grid.num_pictures
            wanted = range(max(start, first), min(end, last))
            if wanted:
                out = tiles[wanted.start - start : wanted.stop - start]
                numbers = range(wanted.start - first, wanted.stop - first)
                self._step("image", self._fill, raw, image, grid, numbers, out)
            first = last
        return tiles

    def _fill(
        self, raw: RawSample, image: "_StoredImage", grid: Grid, numbers: Sequence[int], tiles: np.ndarray
    ) -> None:
        """Pixels of the tiles with these numbers in one image, cut now or in advance; tiles [numbers, 3, S, S]."""
        if image.member:
            picture = image.picture or self._decode_member(raw, image.member)
            if picture.size != image.size:
                width, height = image.size
                raise BadSample(
                    "index",
                    f"its {image.member} has {picture.width}x{picture.height} pixels and its index says "
                    f"{width}x{height}; index it again",
                )
            pictures = cut_tiles(picture, grid, self.tiling.tile_size)
            for place, number in enumerate(numbers):
                write_array(pictures[number], tiles[place])
            return
        names = [f"tile_{number}" for number in range(1, grid.num_tiles + 1)] if grid.num_tiles > 1 else []
        names.append("thumbnail")
        for place, number in enumerate(numbers):
            member = f"{image.number}.{names[number]}.jpg"
            if member not in raw.pictures:
                raise UserError(f"its {member} is missing")
            tile = self._decode_member(raw, member)
            if tile.size != (self.tiling.tile_size, self.tiling.tile_size):
                raise UserError(
                    f"its {member} has {tile.size[0]}x{tile.size[1]} pixels and tiling.tile_size is "
                    f"{self.tiling.tile_size}; build the shards with that size"
                )
            write_array(tile, tiles[place])

    def _decode_member(self, raw: RawSample, member: str) -> Image.Image:
        """A picture of the sample; UserError that names the member if it is none."""
        try:
            return decode_image(raw.pictures[member], self.tiling.background)
        except UserError as error:
            raise UserError(f"its {member}: {error}") from error

    def _assemble(self, turns: list[Turn], grids: list[Grid], open_answer: bool) -> AssembledSample:
        images = [
            _lay_out_grid(grid, self.tiling, self.variant, self.tokenizer, self.template, self.tokens_per_tile)
            for grid in grids
        ]
        first_tags = [first_tag for first_tag, _ in images]
        form = find_template(self.template)
        pieces = encode_conversation(turns, len(grids), self.tokenizer, form, self.system, open_answer, first_tags)
        return assemble(pieces, [layout for _, layout in images])


@lru_cache(maxsize=1024)
def _lay_out_grid(
    grid: Grid, tiling: TilingConfig, variant: Variant, tokenizer: Tokenizer, template: str, tokens_per_tile: int
) -> tuple[str, ImageLayout]:
    """(first tag in the decoder, layout) of an image on this grid; the same for every such image."""
    tags = encode_tags(grid, tiling, variant, tokenizer, find_template(template))
    return tags.first_in_decoder, lay_out_image(tags.ids, variant, tokens_per_tile)


def number_of_images(raw: RawSample) -> int:
    """Images that the sample's record names; UserError if record and pictures disagree."""
    images = raw.record.get("images", [])
    if not isinstance(images, list):
        raise UserError("its 'images' is no list")
    stored = {name.split(".")[0] for name in raw.pictures}
    if stored != {str(number) for number in range(len(images))}:
        raise UserError(f"its record names {len(images)} images and its pictures belong to {len(stored)}")
    return len(images)


def stored_grid(raw: RawSample, image: int) -> Grid:
    """The grid of an image that was cut in advance; UserError unless its record gives one."""
    description = raw.record["images"][image]
    grid = description.get("grid") if isinstance(description, dict) else None
    if not (isinstance(grid, list) and len(grid) == 2 and all(isinstance(side, int) and side > 0 for side in grid)):
        raise UserError(f"its image {image} is cut in tiles and needs 'grid': [columns, rows] in its record")
    return Grid(*grid)
