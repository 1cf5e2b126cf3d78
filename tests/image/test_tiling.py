"""The grid of an image: the release's table, and the rule stated by brute force."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_nvlm.image.tiling import Grid, choose_grid, cut_tiles

REFERENCE = Path(__file__).parents[1] / "reference" / "tiling_grids.json"


def test_equals_the_release_table() -> None:
    rows = json.loads(REFERENCE.read_text())["rows"]
    for row in rows:
        for max_tiles, grid in enumerate(row["closest"], 1):
            assert choose_grid(row["width"], row["height"], max_tiles) == tuple(grid)
    assert len(rows) > 50


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 12))
def test_no_grid_is_closer(width: int, height: int, max_tiles: int) -> None:
    grid = choose_grid(width, height, max_tiles)
    assert 1 <= grid.num_tiles <= max_tiles
    difference = abs(width / height - grid.cols / grid.rows)
    every = [Grid(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if c * r <= max_tiles]
    assert difference == min(abs(width / height - other.cols / other.rows) for other in every)


@pytest.mark.parametrize("size", [(1, 1), (20000, 300), (448, 448), (1000, 300)])
def test_tiles_cover_the_canvas(size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 60).convert("RGB")
    grid = choose_grid(*size, 6)
    tiles = cut_tiles(image, grid, 448)
    assert len(tiles) == grid.num_pictures
    assert all(tile.size == (448, 448) and tile.mode == "RGB" for tile in tiles)
    canvas = image.resize((448 * grid.cols, 448 * grid.rows), Image.Resampling.BICUBIC)
    for number in range(grid.num_tiles):
        left, top = number % grid.cols * 448, number // grid.cols * 448
        assert tiles[number].tobytes() == canvas.crop((left, top, left + 448, top + 448)).tobytes()
