"""The text that names each tile (NVLM paper, section 4.2). Tags are ordinary text; their length is whatever it is."""

from collections.abc import Callable

from megatron_nvlm.errors import UserError
from megatron_nvlm.image.tiling import Grid

BOX_SCALE = 1000
"""Coordinates of 2d_box run from 0 to this over the image. The paper does not say; OCR boxes of its data have this scale."""


def _box(grid: Grid, col: int, row: int) -> str:
    left, right = (round(BOX_SCALE * edge / grid.cols) for edge in (col, col + 1))
    top, bottom = (round(BOX_SCALE * edge / grid.rows) for edge in (row, row + 1))
    return f"<box> ({left}, {top}), ({right}, {bottom}) </box>"


_TAG_OF: dict[str, Callable[[Grid, int, int], str]] = {
    "none": lambda grid, col, row: "",
    "1d": lambda grid, col, row: f"<tile_{row * grid.cols + col + 1}>",
    "2d_grid": lambda grid, col, row: f"<tile_x{col}_y{row}>",
    "2d_box": _box,
}

TAG_FORMATS = tuple(_TAG_OF)


def tile_tags(grid: Grid, tag_format: str, thumbnail_tag: str) -> list[str]:
    """One tag per tile, row by row, the thumbnail's last; an image of one tile has the thumbnail's alone.

    Format `none` gives empty strings.
    """
    if tag_format not in _TAG_OF:
        raise UserError(f"tiling.tag_format is {tag_format!r}; choose one of {', '.join(TAG_FORMATS)}")
    last = "" if tag_format == "none" else thumbnail_tag
    if grid.num_tiles == 1:
        return [last]
    tag = _TAG_OF[tag_format]
    return [*(tag(grid, col, row) for row in range(grid.rows) for col in range(grid.cols)), last]
