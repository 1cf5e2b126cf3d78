"""Dynamic high resolution: an image's size decides its grid of tiles (NVLM paper, section 4.1, after InternVL)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from PIL import Image

from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import check_image_size


class Grid(NamedTuple):
    """How tiles are arranged."""

    cols: int
    rows: int

    @property
    def num_tiles(self) -> int:
        """Regular tiles, without the thumbnail."""
        return self.cols * self.rows

    @property
    def num_pictures(self) -> int:
        """Tiles to encode: with the thumbnail, which an image of one tile does not have beside it."""
        return self.num_tiles + (self.num_tiles > 1)


@dataclass(frozen=True)
class TilingConfig:
    """Section `tiling` of a run."""

    tile_size: int = 448
    """Pixels along an edge of a tile."""
    max_tiles: int = 6
    """Most regular tiles of an image; 1 squashes every image into one tile (paper: pretraining of D and X)."""
    tag_format: str = "1d"
    """none, 1d, 2d_grid or 2d_box."""
    thumbnail_tag: str = "<tile_global_thumbnail>"
    """The release's for Qwen2; <tile_global> in the paper and for Yi."""
    background: str | None = None
    """Colour behind transparent pixels, as Pillow names colours (white, "rgb(255, 255, 255)"); null drops transparency, as
    the release does, which shows whatever colour the file has there."""


@lru_cache(maxsize=64)
def candidate_grids(max_tiles: int) -> tuple[Grid, ...]:
    """Every grid of at most `max_tiles` tiles, fewest tiles first, then fewest columns."""
    if max_tiles < 1:
        raise UserError(f"tiling.max_tiles is {max_tiles}; it must be at least 1")
    grids = (Grid(cols, rows) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles // cols + 1))
    return tuple(sorted(grids, key=lambda grid: (grid.num_tiles, grid.cols)))


def choose_grid(width: int, height: int, max_tiles: int, tile_size: int = 448) -> Grid:
    """The grid whose aspect ratio is closest to the image's.

    Closest is the least |width / height - cols / rows|. Among grids of equal difference a larger one replaces a smaller
    one only if the image has more than half of its pixels.

    Args:
        width, height: of the image, in pixels.
    """
    check_image_size(width, height)
    aspect = width / height
    best, best_difference = Grid(1, 1), float("inf")
    for grid in candidate_grids(max_tiles):
        difference = abs(aspect - grid.cols / grid.rows)
        fills_more_than_half = width * height > 0.5 * tile_size * tile_size * grid.num_tiles
        if difference < best_difference or (difference == best_difference and fills_more_than_half):
            best, best_difference = grid, difference
    return best


def cut_tiles(image: Image.Image, grid: Grid, tile_size: int) -> list[Image.Image]:
    """Tiles row by row, then the thumbnail if there is more than one.

    The whole image is resized (bicubic, aspect ratio not kept) to the grid's canvas and cut; the thumbnail is the whole
    image squashed into one tile.
    """
    rgb = image.convert("RGB")
    canvas = rgb.resize((grid.cols * tile_size, grid.rows * tile_size), Image.Resampling.BICUBIC)
    tiles = [
        canvas.crop((col * tile_size, row * tile_size, (col + 1) * tile_size, (row + 1) * tile_size))
        for row in range(grid.rows)
        for col in range(grid.cols)
    ]
    if grid.num_tiles > 1:
        tiles.append(rgb.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    return tiles
