"""One function per arrow: a stored sample -> pictures -> rows. `SamplePipeline` is all of them, with its settings."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_nvlm.data.records import RawSample, is_whole
from megatron_nvlm.data.row_counts import grid_under_limit, tile_limits
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import decode_image, to_array
from megatron_nvlm.image.tile_tags import tile_tags
from megatron_nvlm.image.tiling import Grid, TilingConfig, choose_grid, cut_tiles
from megatron_nvlm.sequence.assemble import AssembledSample, assemble
from megatron_nvlm.sequence.image_layout import lay_out_image
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


class BadSample(UserError):
    """A sample that cannot be used; `kind` groups such samples in counts."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


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

    def prepare(self, raw: RawSample, open_answer: bool = False) -> PreparedSample:
        """Everything in one go.

        Args:
            open_answer: leave the last answer out and end where the model is to write it.

        Raises:
            BadSample: with the kind of fault: record, image, conversation or too_long.
        """
        images = self._step("record", number_of_images, raw)
        turns = self._step("conversation", read_turns, raw.record)
        if open_answer and turns[-1].role == "assistant":
            turns = turns[:-1]
        for limit in tile_limits(self.tiling.max_tiles):
            pictures = [self._step("image", self._tiles_of, raw, image, limit) for image in range(images)]
            rows = self._step("conversation", self._assemble, turns, [grid for grid, _ in pictures], open_answer)
            if len(rows.tokens) <= self.sequence_length:
                arrays = [to_array(tile) for _, tiles in pictures for tile in tiles]
                size = self.tiling.tile_size
                stacked = np.stack(arrays) if arrays else np.zeros((0, 3, size, size), dtype=np.uint8)
                return PreparedSample(raw.key, rows, stacked, str(raw.record.get("source", "unknown")))
        raise BadSample(
            "too_long", f"it has {len(rows.tokens)} rows, over data.sequence_length of {self.sequence_length}"
        )

    @staticmethod
    def _step(kind: str, function, *args):  # type: ignore[no-untyped-def]
        try:
            return function(*args)
        except UserError as error:
            raise BadSample(kind, str(error)) from error

    def _tiles_of(self, raw: RawSample, image: int, limit: int) -> tuple[Grid, list[Image.Image]]:
        """Grid and pictures of one image, cut in advance or now."""
        whole = [name for name in raw.pictures if name.split(".")[0] == str(image) and is_whole(name)]
        if whole:
            picture = decode_image(raw.pictures[whole[0]])
            grid = choose_grid(*picture.size, limit, self.tiling.tile_size)
            return grid, cut_tiles(picture, grid, self.tiling.tile_size)
        grid = grid_under_limit(stored_grid(raw, image), limit)
        names = [f"tile_{number}" for number in range(1, grid.num_tiles + 1)] if grid.num_tiles > 1 else []
        tiles = []
        for name in [*names, "thumbnail"]:
            member = f"{image}.{name}.jpg"
            if member not in raw.pictures:
                raise UserError(f"its {member} is missing")
            tile = decode_image(raw.pictures[member])
            if tile.size != (self.tiling.tile_size, self.tiling.tile_size):
                raise UserError(
                    f"its {member} has {tile.size[0]}x{tile.size[1]} pixels and tiling.tile_size is "
                    f"{self.tiling.tile_size}; build the shards with that size"
                )
            tiles.append(tile)
        return grid, tiles

    def _assemble(self, turns: list[Turn], grids: list[Grid], open_answer: bool) -> AssembledSample:
        pieces = encode_conversation(turns, len(grids), self.tokenizer, self.template, self.system, open_answer)
        layouts = [
            lay_out_image(
                [
                    self.tokenizer.encode(tag)
                    for tag in tile_tags(grid, self.tiling.tag_format, self.tiling.thumbnail_tag)
                ],
                self.variant,
                self.tokens_per_tile,
            )
            for grid in grids
        ]
        return assemble(pieces, layouts)


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
