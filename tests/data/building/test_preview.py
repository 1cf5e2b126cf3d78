"""`build_shards --preview`: what the first samples become, with nothing written."""

import json
from pathlib import Path

import pytest

from megatron_nvlm.commands.build_shards import main
from megatron_nvlm.data.shards.read import ShardSet
from tests.data.building.builds import coloured
from tests.support.shards import picture


def preview(folder: Path, lines: list[dict[str, object]], *options: str) -> int:
    (folder / "wide.png").write_bytes(picture(112, 56))
    (folder / "red.png").write_bytes(coloured("red"))
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(folder / "set"), "--jsonl", str(folder / "lines.jsonl"), "--tile-size", "56", *options])
    assert not (folder / "set").exists()
    return int(ended.value.code or 0)


LINES: list[dict[str, object]] = [
    {"image": "wide.png", "caption": "A wide\none.", "licence": "CC0"},
    {"image": "missing.png", "caption": "x"},
    {"conversations": [{"from": "human", "value": "a" * 100}, {"from": "gpt", "value": "b"}], "licence": "CC0"},
    {"text": "never looked at"},
]


def test_each_sample_and_what_was_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview(tmp_path, LINES, "--preview", "3") == 0
    shown = capsys.readouterr().out.splitlines()
    path = tmp_path / "lines.jsonl"
    assert shown == [
        f"{path}: jsonl, 4 samples",
        f"  {path} line 1",
        "    form: caption (caption)",
        "    picture 0: 112x56 pixels, 2x1 tiles, 3 stored",
        "    user: <image>\\nDescribe the image briefly.",
        "    assistant: A wide\\none.",
        f"  {path} line 2",
        f"    REJECT its image {tmp_path}/missing.png cannot be read (No such file or directory)",
        f"  {path} line 3",
        "    form: conversation (conversations)",
        f"    user: {'a' * 80}...",
        "    assistant: b",
        "2 samples, 1 rejects",
        "not read: the field licence of 2 samples",
    ]


def test_whole_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview(tmp_path, [{"image": "red.png", "caption": "x"}], "--preview", "9", "--images", "whole") == 0
    assert "picture 0: 56x56 pixels, whole (0.png)" in capsys.readouterr().out


def test_rejects_alone_are_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview(tmp_path, LINES[1:2], "--preview", "2") == 1
    assert "0 samples, 1 rejects" in capsys.readouterr().out


def test_a_set_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(coloured("red"))
    (tmp_path / "lines.jsonl").write_text('{"image": "red.png", "caption": "x"}\n')
    own = ["--out", str(tmp_path / "set"), "--jsonl", str(tmp_path / "lines.jsonl"), "--quiet", "--processes", "1"]
    main(own)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    with pytest.raises(SystemExit):
        main([*own, "--preview", "1", "--rebuild"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before
    assert len(ShardSet(tmp_path / "set")) == 1
