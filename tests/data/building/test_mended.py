"""Inputs that were rejected and have been put right become samples: by the same command, or by --rebuild."""

import json
import os
from pathlib import Path

import pytest

from megatron_nvlm.commands.build_shards import main
from megatron_nvlm.data.shards.read import ShardSet
from tests.data.building.builds import COLOURS, coloured, colours_of


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Six lines in three blocks; blue.png is not there yet."""
    names = ["red", "green", "red", "blue", "green", "red"]
    for name in ("red", "green"):
        (tmp_path / f"{name}.png").write_bytes(coloured(name))
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"image": f"{name}.png", "caption": name}) + "\n" for name in names))
    return path


def build(lines: Path, *options: str) -> Path:
    out = lines.parent / "set"
    own = ("--out", str(out), "--jsonl", str(lines), "--images", "whole", "--processes", "1", "--quiet")
    main([*own, "--samples-per-shard", "2", *options])
    return out


def colours(folder: Path) -> list[str]:
    shards = ShardSet(folder)
    return [colours_of(shards.read(number))[0] for number in range(len(shards))]


def test_a_build_with_too_many_rejects_goes_on_once_they_are_mended(
    lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build(lines)
    assert "1 of 6 inputs were rejected" in capsys.readouterr().err
    kept = {path: path.stat().st_mtime_ns for path in (lines.parent / "set").glob("shard-*.tar")}
    (lines.parent / "blue.png").write_bytes(coloured("blue"))
    out = build(lines)
    assert colours(out) == ["red", "green", "red", "blue", "green", "red"]
    assert (out / "rejects.jsonl").read_text() == ""
    same = [path.name for path, time in kept.items() if path.stat().st_mtime_ns == time]
    assert "shard-000001.tar" not in same and len(same) == len(kept) - ("shard-000001.tar" in {p.name for p in kept})


def test_a_finished_set_says_what_could_be_added(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = build(lines, "--max-reject-rate", "1")
    assert colours(out) == ["red", "green", "red", "green", "red"]
    build(lines, "--max-reject-rate", "1")  # nothing has changed
    (lines.parent / "blue.png").write_bytes(coloured("blue"))
    with pytest.raises(SystemExit):
        build(lines, "--max-reject-rate", "1")
    said = capsys.readouterr().err
    assert "without 1 inputs that are good by now" in said and "line 4 first" in said and "--rebuild" in said
    (out / "notes.txt").write_text("not the build's")
    build(lines, "--rebuild")
    assert colours(out) == ["red", "green", "red", "blue", "green", "red"]
    assert (out / "notes.txt").read_text() == "not the build's"
    assert not [path for path in out.iterdir() if "partial" in path.name or path.name == "parts"]


@pytest.mark.parametrize("changed", ["green.png", "lines.jsonl"])
def test_a_finished_set_is_not_called_built_of_inputs_that_have_changed(
    lines: Path, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    build(lines, "--max-reject-rate", "1")
    path = lines.parent / changed
    path.write_bytes(coloured("blue") if changed == "green.png" else path.read_bytes() + b'{"text": "One more."}\n')
    with pytest.raises(SystemExit):
        build(lines, "--max-reject-rate", "1")
    said = capsys.readouterr().err
    assert "--rebuild" in said and ("green.png was written after" in said or "from other inputs" in said)
    out = build(lines, "--max-reject-rate", "1", "--rebuild")
    assert len(ShardSet(out)) == (5 if changed == "green.png" else 6)
    if changed == "green.png":
        assert colours(out) == ["red", "blue", "red", "blue", "red"]


def test_a_caption_that_has_changed(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = lines.parent / "folder", lines.parent / "captioned"
    folder.mkdir()
    (folder / "a.png").write_bytes(coloured("red"))
    (folder / "a.txt").write_text("Red.")
    own = ["--out", str(out), "--folder", str(folder), "--images", "whole", "--processes", "1", "--quiet"]
    main(own)
    main(own)
    (folder / "a.txt").write_text("Dark red.")
    with pytest.raises(SystemExit):
        main(own)
    assert "a.txt was written after" in capsys.readouterr().err


def test_another_folder_of_pictures_is_another_build(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(lines, "--max-reject-rate", "1")
    others = lines.parent / "others"
    others.mkdir()
    for name in COLOURS:
        (others / f"{name}.png").write_bytes(coloured("blue"))
    with pytest.raises(SystemExit):
        build(lines, "--images-dir", str(others))
    assert "holds a build from other inputs; repeat its command, or give --rebuild" in capsys.readouterr().err
    assert set(colours(build(lines, "--images-dir", str(others), "--rebuild"))) == {"blue"}


def test_a_first_try_that_made_nothing_is_forgotten(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build(lines, "--images-dir", str(lines.parent / "nowhere"))
    assert "of 6 inputs were rejected" in capsys.readouterr().err
    (lines.parent / "blue.png").write_bytes(coloured("blue"))
    assert len(colours(build(lines))) == 6


def test_a_rebuild_removes_no_set_of_another_kind(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = build(lines, "--max-reject-rate", "1")
    (out / "manifest.json").unlink()
    with pytest.raises(SystemExit):
        build(lines, "--rebuild")
    assert "already holds shards of another kind" in capsys.readouterr().err
    assert len(ShardSet(out)) == 5


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_one_reject(lines: Path, kind: str) -> None:
    """A pipe would be waited for, a device has no end."""
    path = lines.parent / "blue.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    out = build(lines, "--max-reject-rate", "1")
    (reject,) = (json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines())
    assert reject["reason"].endswith("blue.png is no file") and reject["where"].endswith("line 4")
