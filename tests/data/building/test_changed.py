"""What is written while a build is unfinished is noticed: its shards are built again, or the file is named."""

import json
import os
from pathlib import Path

import pytest

from megatron_nvlm.commands.build_shards import main
from megatron_nvlm.data.building.build import Builder
from megatron_nvlm.data.building.parts import Parts
from megatron_nvlm.data.shards.read import ShardSet
from tests.data.building.builds import coloured as any_size
from tests.data.building.builds import colours_of, write_tar

NAMES = ("red", "green", "red", "green")


def coloured(colour: str) -> bytes:
    """A picture of one size in bytes, whatever its colour."""
    return any_size(colour).ljust(400, b"\0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four samples as JSON lines with their pictures, as a folder, and as two tars."""
    (tmp_path / "folder").mkdir()
    for number, colour in enumerate(NAMES):
        (tmp_path / "folder" / f"{number}.png").write_bytes(coloured(colour))
        (tmp_path / "folder" / f"{number}.txt").write_text(f"The {colour} one.")
    lines = (json.dumps({"image": f"folder/{number}.png", "caption": "x"}) + "\n" for number in range(4))
    (tmp_path / "lines.jsonl").write_text("".join(lines))
    for first in (0, 2):
        write_tars(tmp_path, first, NAMES[first : first + 2])
    return tmp_path


def write_tars(folder: Path, first: int, colours: tuple[str, ...]) -> Path:
    members = [(f"{first + number}.png", coloured(colour)) for number, colour in enumerate(colours)]
    texts = [(f"{first + number}.txt", "A picture.") for number in range(len(colours))]
    pairs = [member for pair in zip(members, texts, strict=True) for member in pair]
    return write_tar(folder / "tars" / f"{first}.tar", pairs)


SOURCES = {"lines": ("--jsonl", "lines.jsonl"), "folder": ("--folder", "folder"), "tars": ("--webdataset", "tars")}


def build(folder: Path, source: str, *more: str) -> Path:
    option, path = SOURCES[source]
    own = ("--out", str(folder / "set"), option, str(folder / path), "--images", "whole", "--processes", "1", "--quiet")
    main([*own, "--samples-per-shard", "2", *more])
    return folder / "set"


def build_almost(folder: Path, source: str, num_shards: int = 2) -> None:
    """All shards are there, and the build is killed before its index."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Builder, "_finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        build(folder, source)
    assert len(list((folder / "set").glob("shard-*.tar"))) == num_shards


def colours(out: Path) -> list[str]:
    shards = ShardSet(out)
    return [colours_of(shards.read(number))[0] for number in range(len(shards))]


def write(path: Path, data: bytes, later: int) -> None:
    """With a time of writing that is other than the one before, and older if that is asked for."""
    before = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(before, before + later))


@pytest.mark.parametrize("later", [1, -(10**9)], ids=["newer", "older"])
@pytest.mark.parametrize("source", ["lines", "folder"])
def test_a_picture_that_was_written_since_is_read_again(folder: Path, source: str, later: int) -> None:
    build_almost(folder, source)
    kept = (folder / "set" / "shard-000000.tar").stat().st_mtime_ns
    picture = folder / "folder" / "3.png"
    write(picture, coloured("blue"), later)
    out = build(folder, source)
    assert colours(out) == ["red", "green", "red", "blue"]
    assert (out / "shard-000000.tar").stat().st_mtime_ns == kept


def test_a_caption_that_was_written_since_is_read_again(folder: Path) -> None:
    build_almost(folder, "folder")
    write(folder / "folder" / "1.txt", b"A dark green one, of grass.", 1)
    shards = ShardSet(build(folder, "folder"))
    assert shards.read(1).record["conversation"][-1]["value"] == "A dark green one, of grass."


def test_a_tar_that_was_written_since_is_read_again(folder: Path) -> None:
    build_almost(folder, "tars")
    tar = folder / "tars" / "2.tar"
    write(tar, tar.read_bytes().replace(coloured("red"), coloured("blue")), 1)
    assert colours(build(folder, "tars")) == ["red", "green", "blue", "green"]


def test_samples_that_move_among_tars_of_one_size(folder: Path) -> None:
    """Every block is built again, that of the middle tar too, which nobody has touched."""
    write_tars(folder, 4, ("blue",))
    build_almost(folder, "tars", 3)
    sizes = {tar: tar.stat().st_size for tar in (folder / "tars").iterdir()}
    write_tars(folder, 0, ("blue",))
    write_tars(folder, 4, ("blue", "blue"))
    for tar, size in sizes.items():  # tars are filled up to a multiple of 10240 bytes
        assert tar.stat().st_size == size
    assert colours(build(folder, "tars")) == ["blue", "red", "green", "blue", "blue"]


@pytest.mark.parametrize("source", ["folder", "tars"])
def test_another_size_names_the_file(folder: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    build_almost(folder, source)
    path = folder / ("folder/3.png" if source == "folder" else "tars/2.tar")
    write(path, path.read_bytes() + bytes(10240), 1)
    with pytest.raises(SystemExit):
        build(folder, source)
    assert f"from other inputs ({path} has changed); repeat its command, or give --rebuild" in capsys.readouterr().err


def test_what_is_written_during_the_build_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish, picture = Parts.finish, folder / "folder" / "0.png"

    def write_then_finish(self: Parts, block: int, *others: object) -> None:
        if block == 1:
            write(picture, coloured("blue"), 1)
        finish(self, block, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Parts, "finish", write_then_finish)
    with pytest.raises(SystemExit):
        build(folder, "lines")
    assert f"{picture} was written while the shards were built; repeat the command" in capsys.readouterr().err
    monkeypatch.undo()
    assert colours(build(folder, "lines")) == ["blue", "green", "red", "green"]


def test_lines_that_are_written_during_the_build_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish, lines = Parts.finish, folder / "lines.jsonl"
    monkeypatch.setattr(
        Parts, "finish", lambda self, *others: (write(lines, lines.read_bytes() + b"\n", 1), finish(self, *others))
    )
    with pytest.raises(SystemExit):
        build(folder, "lines")
    assert f"{lines} was written while the shards were built" in capsys.readouterr().err


def test_blocks_of_which_nothing_is_known_are_built_again(folder: Path) -> None:
    """Those of a build that an earlier version began."""
    build_almost(folder, "lines")
    (folder / "set" / "parts" / "000001.files").unlink()
    write(folder / "folder" / "3.png", coloured("blue"), 1)
    assert colours(build(folder, "lines")) == ["red", "green", "red", "blue"]


@pytest.mark.parametrize("source", SOURCES)
def test_an_older_file_in_the_place_of_another_is_noticed(
    folder: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a finished set: the file was written before the set."""
    build(folder, source)
    build(folder, source)
    if source == "tars":
        tar = folder / "tars" / "2.tar"
        write(tar, tar.read_bytes().replace(coloured("red"), coloured("blue")), -(10**9))
    else:
        write(folder / "folder" / "3.png", coloured("blue"), -(10**9))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        build(folder, source)
    assert "was replaced after" in (said := capsys.readouterr().err) and "give --rebuild" in said
    build(folder, source, "--rebuild")


def test_a_finished_set_of_an_earlier_version_is_taken(folder: Path) -> None:
    out = build(folder, "lines")
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["files_of_blocks"]
    before = (out / "manifest.json").stat().st_mtime_ns
    (out / "manifest.json").write_text(json.dumps(manifest))
    os.utime(out / "manifest.json", ns=(before, before))
    build(folder, "lines")
