"""One function per arrow: a stored sample -> pictures -> rows. `SamplePipeline` is all of them, with its settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from megatron_nvlm.data.records import RawSample, is_whole
from megatron_nvlm.data.row_counts import grid_under_limit, tile_limits
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import decode_image, write_array
from megatron_nvlm.image.tiling import Grid, TilingConfig, choose_grid, cut_tiles
from megatron_nvlm.sequence.assemble import AssembledSample, assemble
from megatron_nvlm.sequence.image_layout import ImageLayout, lay_out_image
from megatron_nvlm.sequence.tag_ids import encode_tags
from megatron_nvlm.sequence.variants import Variant
from megatron_nvlm.text.conversation import Turn, encode_conversation, read_turns
from megatron_nvlm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreparedSample:
    """What a micro-batch takes from one sample."""

    key: str
    rows: AssembledSample
    tiles: np.ndarray
    """uint8 [tiles, 3, S, S]."""
    source: str


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
    """An image of a sample, by number: whole (decoded), or cut in advance on a grid."""

    number: int
    picture: Image.Image | None
    grid: Grid | None


@dataclass(frozen=True)
class SamplePipeline:
    """Settings of the arrows. Building the same sample twice gives the same rows and pixels."""

    tokenizer: Tokenizer
    tiling: TilingConfig
    variant: Variant
    tokens_per_tile: int
    sequence_length: int
    template: str
    system: str | None

    def prepare(self, raw: RawSample, open_answer: bool = False, allocate: AllocateTiles = new_tiles) -> PreparedSample:
        """Everything in one go.

        Args:
            open_answer: leave the last answer out and end where the model is to write it.
            allocate: gives the memory for the tiles.

        Raises:
            BadSample: with the kind of fault: record, image, conversation or too_long.
        """
        images = self._step("record", number_of_images, raw)
        turns = self._step("conversation", read_turns, raw.record)
        if open_answer and turns[-1].role == "assistant":
            turns = turns[:-1]
        stored = [self._step("image", self._open_image, raw, image) for image in range(images)]
        for limit in tile_limits(self.tiling.max_tiles):
            grids = [self._step("image", self._choose_grid, image, limit) for image in stored]
            rows = self._step("conversation", self._assemble, turns, grids, open_answer)
            if len(rows.tokens) <= self.sequence_length:
                tiles = allocate(sum(grid.num_pictures for grid in grids), self.tiling.tile_size)
                first = 0
                for image, grid in zip(stored, grids, strict=True):
                    self._step("image", self._fill, raw, image, grid, tiles[first : first + grid.num_pictures])
                    first += grid.num_pictures
                return PreparedSample(raw.key, rows, tiles, str(raw.record.get("source", "unknown")))
        raise BadSample(
            "too_long", f"it has {len(rows.tokens)} rows, over data.sequence_length of {self.sequence_length}"
        )

    @staticmethod
    def _step(kind: str, function, *args):  # type: ignore[no-untyped-def]
        try:
            return function(*args)
        except UserError as error:
            raise BadSample(kind, str(error)) from error

    @staticmethod
    def _open_image(raw: RawSample, image: int) -> "_StoredImage":
        """The whole picture, decoded, or the grid of tiles cut in advance."""
        whole = [name for name in raw.pictures if name.split(".")[0] == str(image) and is_whole(name)]
        if whole:
            return _StoredImage(image, decode_image(raw.pictures[whole[0]]), None)
        return _StoredImage(image, None, stored_grid(raw, image))

    def _choose_grid(self, image: "_StoredImage", limit: int) -> Grid:
        if image.picture is not None:
            return choose_grid(*image.picture.size, limit, self.tiling.tile_size)
        assert image.grid is not None
        return grid_under_limit(image.grid, limit)

    def _fill(self, raw: RawSample, image: "_StoredImage", grid: Grid, tiles: np.ndarray) -> None:
        """Pixels of one image, cut now or in advance; tiles [grid's pictures, 3, S, S]."""
        if image.picture is not None:
            pictures = cut_tiles(image.picture, grid, self.tiling.tile_size)
            for place, tile in enumerate(pictures):
                write_array(tile, tiles[place])
            return
        names = [f"tile_{number}" for number in range(1, grid.num_tiles + 1)] if grid.num_tiles > 1 else []
        for place, name in enumerate([*names, "thumbnail"]):
            member = f"{image.number}.{name}.jpg"
            if member not in raw.pictures:
                raise UserError(f"its {member} is missing")
            tile = decode_image(raw.pictures[member])
            if tile.size != (self.tiling.tile_size, self.tiling.tile_size):
                raise UserError(
                    f"its {member} has {tile.size[0]}x{tile.size[1]} pixels and tiling.tile_size is "
                    f"{self.tiling.tile_size}; build the shards with that size"
                )
            write_array(tile, tiles[place])

    def _assemble(self, turns: list[Turn], grids: list[Grid], open_answer: bool) -> AssembledSample:
        images = [
            _rows_of_image(grid, self.tiling, self.variant, self.tokenizer, self.template, self.tokens_per_tile)
            for grid in grids
        ]
        first_tags = [first_tag for first_tag, _ in images]
        pieces = encode_conversation(
            turns, len(grids), self.tokenizer, self.template, self.system, open_answer, first_tags=first_tags
        )
        return assemble(pieces, [layout for _, layout in images])


@lru_cache(maxsize=1024)
def _rows_of_image(
    grid: Grid, tiling: TilingConfig, variant: Variant, tokenizer: Tokenizer, template: str, tokens_per_tile: int
) -> tuple[str, ImageLayout]:
    """(first tag in the decoder, layout) of an image on this grid; the same for every such image."""
    tags = encode_tags(grid, tiling, variant, tokenizer, template)
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
