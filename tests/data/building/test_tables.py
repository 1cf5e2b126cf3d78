"""A row of a table becomes what the same line of JSON becomes, whatever the kind of table and of its groups."""

import base64
import datetime
import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc, parquet

from megatron_nvlm.commands.build_shards import main
from megatron_nvlm.data.building.tables import find_tables
from megatron_nvlm.errors import UserError
from tests.data.building.builds import build, coloured, colours_of, hashes, turns_of

COLOURS = ("red", "green", "blue", "red", "blue")


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def rows() -> list[dict[str, Any]]:
    """With pictures as `datasets` writes them; the last is text alone."""
    pictures = [{"bytes": coloured(colour), "path": f"{colour}.png"} for colour in COLOURS]
    made = [
        {"id": f"row {number}", "image": image, "conversations": talk(f"<image>Which {number}?", f"this {number}")}
        for number, image in enumerate(pictures)
    ]
    return [*made, {"id": "text", "image": None, "conversations": talk("Hello", "Ho")}]


def as_json(path: Path, content: list[dict[str, Any]]) -> Path:
    def plain(value: Any) -> str:
        return base64.b64encode(value).decode()

    path.write_text("".join(json.dumps(row, default=plain) + "\n" for row in content))
    return path


def write_arrow(path: Path, table: pyarrow.Table, stream: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = (ipc.new_stream if stream else ipc.new_file)(str(path), table.schema)
    with opened as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def write_table(folder: Path, kind: str, content: list[dict[str, Any]]) -> Path:
    table = pyarrow.Table.from_pylist(content)
    if kind == "parquet":
        parquet.write_table(table, folder / "rows.parquet", row_group_size=2)
        return folder / "rows.parquet"
    if kind == "folder":
        (folder / "parts" / "deep").mkdir(parents=True)
        parquet.write_table(table.slice(0, 4), folder / "parts" / "000.parquet", row_group_size=3)
        parquet.write_table(table.slice(4), folder / "parts" / "deep" / "001.parquet")
        (folder / "parts" / "dataset_info.json").write_text("{}")
        return folder / "parts"
    return write_arrow(folder / "saved" / "data-00000-of-00001.arrow", table, kind == "stream").parent


def whole_set(out: Path, *source: object) -> Path:
    main(["--out", str(out), *map(str, source), "--images", "whole", "--quiet", "--samples-per-shard", "4"])
    return out


@pytest.mark.parametrize("kind", ["parquet", "folder", "stream", "file"])
def test_a_table_gives_the_bytes_that_its_lines_give(tmp_path: Path, kind: str) -> None:
    lines = hashes(whole_set(tmp_path / "a" / "set", "--jsonl", as_json(tmp_path / "rows.jsonl", rows())))
    assert len(lines) > 4
    table = write_table(tmp_path, kind, rows())
    assert hashes(whole_set(tmp_path / "b" / "set", "--table", table, "--processes", "2", "--shuffle", "1")) != lines
    assert hashes(whole_set(tmp_path / "c" / "set", "--table", table)) == lines


def test_pictures_as_bytes_as_paths_and_turns_in_columns(tmp_path: Path) -> None:
    for colour in ("red", "green"):
        (tmp_path / f"{colour}.png").write_bytes(coloured(colour))
    content = [{"image": coloured("blue"), "caption": "bytes"}, {"image": coloured("red"), "caption": "more"}]
    parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "a.parquet")
    content = [{"images": ["green.png", "red.png"], "caption": "paths", "when": datetime.date(2026, 1, 2)}]
    parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "b.parquet")
    turns = {"from": ["human", "gpt"], "value": ["<image>What?", "This."]}
    content = [{"image": {"bytes": coloured("green"), "path": None}, "conversations": turns, "score": float("nan")}]
    parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "c.parquet")
    samples, rejects = build(tmp_path / "set", "--table", tmp_path, "--keep", "when")
    assert rejects == []
    assert [colours_of(sample) for sample in samples] == [["blue"], ["red"], ["green", "red"], ["green"]]
    assert samples[2].record["when"] == "2026-01-02" and turns_of(samples[3])[1] == ("gpt", "This.")


def test_what_a_row_cannot_be_is_a_named_reject(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    content = [
        {"text": b"no text", "caption": None, "image": None, "thumbnail": None},
        {"text": None, "caption": "x", "image": b"no picture", "thumbnail": None},
        {"text": None, "caption": "x", "image": coloured("red"), "thumbnail": {"bytes": b"x"}},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(content), path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "z.parquet").write_bytes(path.read_bytes()[:-20])
    samples, rejects = build(tmp_path / "set", "--table", path, "--table", tmp_path / "broken")
    assert samples == []
    says = ["z.parquet cannot be read", "'text' holds bytes", "image 0: the image cannot be", "'thumbnail.bytes' holds"]
    assert all(any(words in reject for reject in rejects) for words in says) and len(rejects) == 4
    where = [json.loads(line)["where"] for line in (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()]
    assert f"{path} row 2" in where


def test_bytes_are_not_kept(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows()[:1]), tmp_path / "rows.parquet")
    samples, rejects = build(tmp_path / "set", "--table", tmp_path / "rows.parquet", "--keep", "image")
    assert samples == [] and "its 'image' holds bytes, which --keep cannot keep" in rejects[0]


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    for name in ("both/a.parquet", "both/a.arrow", "words.txt"):
        (tmp_path / name).write_bytes(b"x")
    for path, says in (
        (tmp_path / "words.txt", "is no file that ends in .parquet or .arrow, nor a folder"),
        (tmp_path / "none", "is no file that ends in"),
        (tmp_path / "both", "has files of both kinds, .parquet and .arrow"),
    ):
        with pytest.raises(UserError, match=says):
            find_tables(path)
    (tmp_path / "both" / "a.arrow").rename(tmp_path / "both" / "cache-1.arrow")
    assert find_tables(tmp_path / "both") == [tmp_path / "both" / "a.parquet"]


def test_without_pyarrow_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_nvlm.data.building.tables.find_spec", lambda name: None)
    assert importlib.util.find_spec("pyarrow")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "out"), "--table", str(tmp_path)])
    assert "install it (pip install 'megatron-nvlm[tables]')" in capsys.readouterr().err
