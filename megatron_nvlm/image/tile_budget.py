"""How a sample that is too long gives up tiles: the one rule, for preparing, counting and showing samples alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_nvlm.image.tiling import Grid, TilingConfig, choose_grid

TILE_LADDER = (12, 8, 6, 4, 2, 1)
"""Limits on the tiles of an image that a too long sample tries, one after the other (the release's loader)."""


@dataclass(frozen=True)
class SourceImage:
    """What decides an image's tiles."""

    width: int
    height: int
    cut: Grid | None = None
    """The grid of an image that was cut in advance."""


def grid_choices(images: Sequence[SourceImage], tiling: TilingConfig) -> Iterator[list[Grid]]:
    """Grids of a sample's images, one list a limit on tiles, the run's own limit first.

    Raises:
        UserError: an image has no size.
    """
    for limit in (tiling.max_tiles, *(limit for limit in TILE_LADDER if limit < tiling.max_tiles)):
        yield [_grid_under_limit(image, limit, tiling.tile_size) for image in images]


def _grid_under_limit(image: SourceImage, limit: int, tile_size: int) -> Grid:
    """An image cut in advance keeps its grid, or its thumbnail alone where one tile is allowed."""
    if image.cut is None:
        return choose_grid(image.width, image.height, limit, tile_size)
    return Grid(1, 1) if limit == 1 else image.cut
