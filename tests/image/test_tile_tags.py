"""Tags of every format on every grid up to 12 tiles, and where they stand for D, X and H."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.errors import UserError
from megatron_nvlm.image.tile_tags import TAG_FORMATS, tile_tags
from megatron_nvlm.image.tiling import Grid, TilingConfig, candidate_grids
from megatron_nvlm.sequence.image_layout import lay_out_image
from megatron_nvlm.sequence.tag_ids import encode_tags
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.conversation import find_template
from megatron_nvlm.text.tokenizer import Tokenizer

GLOBAL = "<tile_global>"


def test_the_papers_strings() -> None:
    """NVLM paper, section 4.2, for a grid of 3 columns and 2 rows."""
    grid = Grid(3, 2)
    assert tile_tags(grid, "none", GLOBAL) == [""] * 7
    assert tile_tags(grid, "1d", GLOBAL) == [*(f"<tile_{number}>" for number in range(1, 7)), GLOBAL]
    assert tile_tags(grid, "2d_grid", GLOBAL) == [
        *("<tile_x0_y0>", "<tile_x1_y0>", "<tile_x2_y0>", "<tile_x0_y1>", "<tile_x1_y1>", "<tile_x2_y1>"),
        GLOBAL,
    ]
    assert tile_tags(grid, "2d_box", GLOBAL)[:2] == [
        "<box> (0, 0), (333, 500) </box>",
        "<box> (333, 0), (667, 500) </box>",
    ]


@pytest.mark.parametrize("tag_format", TAG_FORMATS)
def test_an_image_of_one_tile_has_the_thumbnails_tag(tag_format: str) -> None:
    assert tile_tags(Grid(1, 1), tag_format, GLOBAL) == ["" if tag_format == "none" else GLOBAL]


@given(st.sampled_from(candidate_grids(12)))
def test_boxes_tile_the_image(grid: Grid) -> None:
    boxes = [[int(n) for n in re.findall(r"\d+", tag)] for tag in tile_tags(grid, "2d_box", GLOBAL)[: grid.num_tiles]]
    covered = np.zeros((1000, 1000), dtype=int)
    for left, top, right, bottom in boxes if grid.num_tiles > 1 else [[0, 0, 1000, 1000]]:
        covered[top:bottom, left:right] += 1
    assert (covered == 1).all()


def test_unknown_format() -> None:
    with pytest.raises(UserError, match="tiling.tag_format is '3d'; choose one of none, 1d"):
        tile_tags(Grid(2, 1), "3d", GLOBAL)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(qwen2_tokenizer(2048))


@pytest.mark.parametrize("template", ["chatml", "chatml_hf"])
@pytest.mark.parametrize("tag_format", TAG_FORMATS)
@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_each_tag_stands_where_its_variant_has_it(
    tokenizer: Tokenizer, variant: str, tag_format: str, template: str
) -> None:
    """Tag and tile alternate, in the decoder for D and in the context for H; X's tags see their own tile alone."""
    tiling, form, per_tile = TilingConfig(tag_format=tag_format), VARIANTS[variant], 4
    for grid in candidate_grids(12):
        tags = encode_tags(grid, tiling, form, tokenizer, find_template(template))
        layout = lay_out_image(tags.ids, form, per_tile)
        last = len(tags.ids) - 1
        tiles = [[-1] * len(ids) + list(range(n * per_tile, (n + 1) * per_tile)) for n, ids in enumerate(tags.ids)]
        decoder, context = layout.decoder_vision_index.tolist(), layout.context_vision_index.tolist()
        if variant == "d":
            assert decoder == sum(tiles, []) and context == []
        elif variant == "h":
            assert decoder == tiles[last] and context == sum(tiles[:last], [])
            assert layout.context_tokens[layout.context_vision_index < 0].tolist() == sum(tags.ids[:last], [])
        else:
            assert decoder == [-1] * sum(map(len, tags.ids)) and context == list(range((last + 1) * per_tile))
            seen = [(n * per_tile, (n + 1) * per_tile) for n, ids in enumerate(tags.ids) for _ in ids]
            assert [tuple(row) for row in layout.decoder_intervals.tolist()] == seen
        shown = tags.ids if variant != "h" else tags.ids[last:]
        assert layout.decoder_tokens[layout.decoder_vision_index < 0].tolist() == sum(shown, [])


def test_tags_of_unequal_length(tokenizer: Tokenizer) -> None:
    lengths = {
        len(ids)
        for ids in encode_tags(Grid(4, 3), TilingConfig(), VARIANTS["d"], tokenizer, find_template("chatml")).ids
    }
    assert len(lengths) > 1
