"""Pixel shuffle against the release's tables and by its rule."""

import json
from pathlib import Path

import pytest
import torch

from megatron_nvlm.ops.pixel_shuffle import pixel_shuffle, source_patches

TABLES = Path(__file__).parents[1] / "reference" / "pixel_shuffle_tables.json"


def test_equals_the_release_table() -> None:
    table = json.loads(TABLES.read_text())["table"]
    sides = [int(name.removeprefix("v2.side")) for name in table if name.startswith("v2.side")]
    assert max(sides) >= 32
    for side in sides:
        assert source_patches(side).tolist() == table[f"v2.side{side}"]


def test_each_token_is_a_block_of_four() -> None:
    side = 6
    for token, patches in enumerate(source_patches(side).tolist()):
        row, col = divmod(token, side // 2)
        corner = 2 * row * side + 2 * col
        assert patches == [corner, corner + 1, corner + side, corner + side + 1]


def test_an_odd_grid_is_filled_up_with_zeros() -> None:
    """Patches 1 to 9 of a grid of 3 x 3."""
    tokens = pixel_shuffle(torch.arange(1, 10).view(1, 9, 1))
    assert tokens[0].tolist() == [[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]


def test_what_is_no_square_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a square of patches; got 8 a tile"):
        pixel_shuffle(torch.zeros(1, 8, 4))
