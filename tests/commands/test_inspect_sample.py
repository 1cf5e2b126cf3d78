"""What the pictures of a sample say is what the model gets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_nvlm.commands.inspect_sample import find_grids, main, make_panels
from megatron_nvlm.data.building import draw
from megatron_nvlm.data.prepare import SamplePipeline
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.image.tiling import Grid, TilingConfig
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.shards import cut_sample, good_samples, picture, record, write_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect")
    qwen2_tokenizer(1024).save(str(path / "tokenizer.json"))
    write_samples(path / "set", [*good_samples(4), cut_sample(Grid(2, 1), Grid(1, 1))])
    return path


def pipeline(folder: Path, variant: str, length: int = 1000) -> SamplePipeline:
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return SamplePipeline(tokenizer, TilingConfig(56, 6), VARIANTS[variant], 4, length, "chatml", None)


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_cells_spell_the_rows(folder: Path, variant: str) -> None:
    raw = ShardSet(folder / "set").read(4)
    arrows = pipeline(folder, variant)
    prepared = arrows.prepare(raw)
    cells = draw.token_cells(prepared, arrows.tokenizer, 4)
    learned = "".join(cell.text for cell in cells if cell.colour == "learned")
    assert learned == "this<|im_end|>\\n"
    assert sum(cell.colour == "learned" for cell in cells) == int(prepared.sequence.loss_mask.sum())
    tiles = [cell.text for cell in cells if cell.colour == "vision"]
    expected = {"d": [1, 2, 3, 4], "x": [], "h": [3, 4]}[variant]
    assert tiles == [f"tile {number}: 4 vision tokens" for number in expected]
    context = [cell.text for cell in draw.context_cells(prepared, arrows.tokenizer, 4) if cell.colour == "vision"]
    assert context == [f"tile {n}: 4 vision tokens" for n in {"d": [], "x": [1, 2, 3, 4], "h": [1, 2]}[variant]]


def test_the_interval_picture_is_dark_where_a_row_sees(folder: Path) -> None:
    arrows = pipeline(folder, "x")
    prepared = arrows.prepare(ShardSet(folder / "set").read(4))
    image = np.asarray(draw.draw_intervals(prepared, 4).image)
    rows = prepared.sequence
    height, width = image.shape[0] - 30, round(len(rows.context_tokens) * 16.0)
    left, above = 2 * draw.MARGIN + 6, 20
    for row in range(len(rows.tokens)):
        y = above + int((row + 0.5) * height / len(rows.tokens))
        seen = [
            bool(image[y, left + int((column + 0.5) * width / len(rows.context_tokens))][0] < 128)
            for column in range(len(rows.context_tokens))
        ]
        start, end = rows.context_intervals[row].tolist()
        assert seen == [start <= column < end for column in range(len(rows.context_tokens))]


def test_tiles_are_drawn_under_their_tags(folder: Path) -> None:
    arrows = pipeline(folder, "d")
    raw = ShardSet(folder / "set").read(4)
    prepared = arrows.prepare(raw)
    assert find_grids(raw, arrows.tiling, prepared.sequence.num_tiles) == [Grid(2, 1), Grid(1, 1)]
    titles = [panel.title for panel in make_panels(raw, arrows, ("stored", "tiles", "rows", "intervals"), first=True)]
    assert titles[:2] == ["stored", "tiles with their tags"] and len(titles) == 4


def test_a_sample_that_gave_up_tiles_is_drawn_with_those_it_has(folder: Path, tmp_path: Path) -> None:
    sets = ShardSet(write_samples(tmp_path / "set", [(record("?", "x"), {"0.png": picture(600, 100)})]))
    arrows = pipeline(folder, "d", length=90)
    raw = sets.read(0)
    prepared = arrows.prepare(raw)
    assert prepared.sequence.num_tiles < 7
    assert (
        sum(grid.num_pictures for grid in find_grids(raw, arrows.tiling, prepared.sequence.num_tiles))
        == prepared.sequence.num_tiles
    )
    make_panels(raw, arrows, ("tiles",), first=True)


@pytest.mark.parametrize("number", range(5))
def test_every_kind_of_sample_is_drawn(folder: Path, tmp_path: Path, number: int) -> None:
    common = ["--shards", str(folder / "set"), "--tokenizer", str(folder / "tokenizer.json"), "--tile-size", "56"]
    main([*common, "--number", str(number), "--out", str(tmp_path / "a.png")])
    assert Image.open(tmp_path / "a.png").width == draw.WIDTH
    main([*common, "--number", str(number), "--out", str(tmp_path / "a.html"), "--variant", "h", "--stage", "rows"])
    assert (tmp_path / "a.html").read_text().count("<img") == (1 if number == 3 else 2)


def test_mistakes_are_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, tokenizer = ["--shards", str(folder / "set")], ["--tokenizer", str(folder / "tokenizer.json")]
    out = ["--out", str(tmp_path / "a.png")]
    for arguments, says in (
        ([*shards, *tokenizer, *out, "--number", "5"], "holds samples 0 to 4 and --number is 5"),
        ([*shards, *tokenizer, *out, "--key", "no"], "has the key or id 'no'"),
        ([*shards, *out], "no tokenizer; give --tokenizer"),
        ([*shards, *tokenizer, "--out", "a.gif"], "must end in .png or .html"),
    ):
        with pytest.raises(SystemExit) as status:
            main(arguments)
        assert status.value.code == 2 and says in capsys.readouterr().err


def test_a_sample_is_found_by_an_id_that_is_a_number_and_shown_as_stored(tmp_path: Path) -> None:
    """Whatever its length, without a tokenizer, into a folder that is not there yet."""
    content = {**record("word " * 3000, "Yes.", 0), "id": 17}
    write_samples(tmp_path / "set", [(record("other", "1"), {"0.png": picture(40, 40)}), (content, {})])
    out = tmp_path / "new" / "folder" / "a.png"
    main(["--shards", str(tmp_path / "set"), "--key", "17", "--stage", "stored", "--out", str(out)])
    assert Image.open(out).width == draw.WIDTH
