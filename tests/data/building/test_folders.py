"""A folder gives every picture in it, after links too and each once, and names what it does not read."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.commands.build_shards import main
from megatron_nvlm.data.building.inputs import ImageFolder
from tests.data.building.builds import build, coloured


def put(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(coloured(colour))
    path.with_suffix(".txt").write_text("words")


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def test_linked_folders_and_files_are_followed(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    put(root / "a.png")
    put(elsewhere / "b.png")
    put(elsewhere / "deep" / "c.png")
    put(tmp_path / "third" / "d.png")
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "onward").symlink_to(Path("..") / "third")
    for suffix in ("png", "txt"):
        (root / f"e.{suffix}").symlink_to(root / f"a.{suffix}")
    samples, rejects = build(tmp_path / "set", "--folder", root)
    found = ["a", "e", "linked/b", "linked/deep/c", "linked/onward/d"]
    assert rejects == [] and [sample.record["id"] for sample in samples] == found
    assert manifest_of(tmp_path / "set")["unread"] == {}


def test_links_make_no_loop_and_repeat_nothing(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    put(root / "x" / "a.png")
    put(elsewhere / "b.png")
    put(tmp_path / "beside.png")
    links = {
        root / "0": root / "x",  # read already, by its own name
        root / "1": elsewhere,
        root / "2": elsewhere,
        root / "x" / "self": root / "x",
        root / "x" / "root": root,
        root / "up": tmp_path,  # holds the root
        elsewhere / "back": root,
        elsewhere / "up": tmp_path,
        root / "round": root / "round",
    }
    for link, target in links.items():
        link.symlink_to(target)
    source = ImageFolder(root)
    assert source.names == ["1/b.png", "x/a.png"]
    assert source.faults == [] and source.unread == {"file round": 1}


def test_files_that_are_not_read_are_counted_and_named(tmp_path: Path) -> None:
    root = tmp_path / "in"
    put(root / "a.png")
    for name in ("b.psd", "deep/c.psd", "d.HEICS", "README", "alone.txt", ".hidden", ".cache/e.psd"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    os.mkfifo(root / "pipe.png")
    samples, rejects = build(tmp_path / "set", "--folder", root)
    expected = {"file .psd": 2, "file .HEICS": 1, "file README": 1, "file .txt without a picture": 1, "file .png": 1}
    assert len(samples) == 1 and rejects == [] and manifest_of(tmp_path / "set")["unread"] == expected
    for name in ("report.txt", "report.html"):
        assert all(part in (tmp_path / "set" / name).read_text() for part in expected)


def test_a_folder_without_a_picture_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.psd").write_text("x")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "set"), "--folder", str(tmp_path / "in")])
    assert "the input holds no sample (not read: 1 file .psd); correct" in capsys.readouterr().err


def test_what_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "in"
    put(root / "a.png")
    (root / "gone.png").symlink_to(tmp_path / "nothing.png")
    (root / "gone.txt").write_text("words")
    (root / "locked").mkdir()
    scan = os.scandir

    def refuse(path: Any) -> Any:  # permissions do not hold for root, who may run the tests
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    samples, rejects = build(tmp_path / "set", "--folder", root)
    assert len(samples) == 1 and len(rejects) == 2
    assert rejects[0].endswith("in/locked cannot be read (Permission denied); correct its permissions")
    assert "gone.png cannot be read (No such file or directory)" in rejects[1]
