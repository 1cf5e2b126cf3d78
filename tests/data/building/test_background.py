"""A build with a background: tiles cut in advance have it, and a run with another one refuses the set."""

import io
from pathlib import Path

import pytest
from PIL import Image

from megatron_nvlm.commands.build_shards import main
from megatron_nvlm.config.load import load_run
from megatron_nvlm.config.rules import check_data
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.errors import UserError
from megatron_nvlm.models.config import resolve_model
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.data.building.builds import build
from tests.support.shards import write_run

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A picture whose pixels are all transparent, in a format that is kept and in one that becomes PNG."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "b.tiff"):
        Image.new("RGBA", (56, 56), (0, 0, 0, 0)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text("Nothing.")
    return folder


def corners(samples: list) -> list[tuple[int, ...]]:  # type: ignore[type-arg]
    """The corner of each stored picture as it is, transparent where it is transparent."""
    stored = [data for sample in samples for data in sample.pictures.values()]
    return [Image.open(io.BytesIO(data)).getpixel((0, 0)) for data in stored]  # type: ignore[misc]


def test_what_is_stored(tmp_path: Path, folder: Path) -> None:
    source = ("--folder", folder)
    assert corners(build(tmp_path / "dropped", *source, images="tiles")[0]) == [BLACK, BLACK]
    assert corners(build(tmp_path / "white", *source, "--background", "white", images="tiles")[0]) == [WHITE, WHITE]
    kept = build(tmp_path / "whole", *source, "--background", "white", images="whole")[0]
    assert corners(kept) == [(0, 0, 0, 0), WHITE]


def test_a_run_with_another_background_refuses_the_tiles(tmp_path: Path, folder: Path) -> None:
    build(tmp_path / "set", "--folder", folder, "--background", "white", images="tiles")
    run = load_run(write_run(tmp_path / "a", train=tmp_path / "set"))
    model, tokenizer = resolve_model(run.model), Tokenizer.load(Path(run.data.tokenizer))
    with pytest.raises(
        UserError, match="were cut with background white and tiling.background is null; build them with"
    ):
        check_data(run, model, tokenizer, [ShardSet(tmp_path / "set")])
    run = load_run(write_run(tmp_path / "b", train=tmp_path / "set", tiling={"background": "white"}))
    check_data(run, model, tokenizer, [ShardSet(tmp_path / "set")])


def test_a_colour_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "out"), "--folder", str(tmp_path), "--background", "whit"])
    assert "error: tiling.background is 'whit', which is no opaque colour" in capsys.readouterr().err
