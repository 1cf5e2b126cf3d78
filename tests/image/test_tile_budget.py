"""A too long sample gives up tiles by one ladder."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.errors import UserError
from megatron_nvlm.image.tile_budget import SourceImage, grid_choices
from megatron_nvlm.image.tiling import Grid, TilingConfig

sizes = st.integers(min_value=1, max_value=4000)
cuts = st.none() | st.builds(Grid, st.integers(1, 3), st.integers(1, 2))
images = st.lists(st.builds(SourceImage, sizes, sizes, cuts), min_size=1, max_size=3)


@given(images, st.integers(min_value=1, max_value=12))
def test_each_choice_has_no_more_tiles_than_the_one_before(found: list[SourceImage], max_tiles: int) -> None:
    choices = list(grid_choices(found, TilingConfig(max_tiles=max_tiles)))
    for image, grids in zip(found, zip(*choices, strict=True), strict=True):
        if image.cut is None:
            assert grids[0].num_tiles <= max_tiles
        else:
            assert set(grids[:-1]) <= {image.cut}
        assert grids[-1] == Grid(1, 1), "the thumbnail alone is the last choice"


def test_the_limits_are_the_runs_own_and_then_the_ladders() -> None:
    wide = SourceImage(4480, 448)
    choices = [grids[0].num_tiles for grids in grid_choices([wide], TilingConfig(max_tiles=7))]
    assert choices == [7, 6, 4, 2, 1]


def test_an_image_of_no_size_is_refused() -> None:
    with pytest.raises(UserError):
        next(grid_choices([SourceImage(0, 10)], TilingConfig()))
