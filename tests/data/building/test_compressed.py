"""The same samples, whatever holds them: gzip, zstd, folders below folders, patterns and braces."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pytest

from megatron_nvlm.commands.build_shards import main
from megatron_nvlm.data.shards.read import ShardSet
from tests.data.building.builds import COLOURS, coloured, colours_of, hashes, write_tar


def build(out: Path, *source: object) -> Path:
    main(["--out", str(out), *map(str, source), "--images", "whole", "--quiet", "--samples-per-shard", "2"])
    return out


def colours(out: Path) -> list[str]:
    shards = ShardSet(out)
    return [colours_of(shards.read(number))[0] for number in range(len(shards))]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(coloured(colour))
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"image": f"{colour}.png", "caption": colour}) + "\n" for colour in COLOURS))
    return path


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """tars/000.tar, tars/001.tar and tars/deep/002.tar of one sample each."""
    for number, colour in enumerate(COLOURS):
        name = f"{'deep/' if number == 2 else ''}{number:03d}.tar"
        write_tar(tmp_path / "tars" / name, [("a.png", coloured(colour)), ("a.txt", colour)])
    return tmp_path / "tars"


def zstd(data: bytes) -> bytes:
    """In two frames, as `pzstd` and concatenated files have."""
    half = len(data) // 2
    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:]))


def compress(path: Path, name: str) -> Path:
    packed = path.with_name(name)
    pack = zstd if packed.suffix in (".zst", ".tzst") else gzip.compress
    packed.write_bytes(pack(path.read_bytes()))
    return packed


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_json_lines_give_the_same_bytes_compressed(lines: Path, tmp_path: Path, suffix: str) -> None:
    plain = hashes(build(tmp_path / "a" / "set", "--jsonl", lines))
    packed = compress(lines, f"lines.jsonl.{suffix}")
    assert len(plain) > 4 and hashes(build(tmp_path / "b" / "set", "--jsonl", packed)) == plain


def test_an_array_and_several_files(lines: Path, tmp_path: Path) -> None:
    array = lines.with_name("lines.json")
    array.write_text("[" + ",".join(lines.read_text().splitlines()) + "]")
    packed = compress(array, "lines.json.gz")
    assert colours(build(tmp_path / "set", "--jsonl", packed, "--jsonl", lines)) == [*COLOURS, *COLOURS]


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst", ".tzst"])
def test_tars_give_the_same_bytes_compressed(tars: Path, tmp_path: Path, suffix: str) -> None:
    plain = hashes(build(tmp_path / "a" / "set", "--webdataset", tars))
    for tar in list(tars.rglob("*.tar")):
        compress(tar, tar.stem + suffix)
        tar.unlink()
    assert hashes(build(tmp_path / "b" / "set", "--webdataset", tars)) == plain


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", 3),
        ("*.tar", 2),
        ("00[01].tar", 2),
        ("**/*.tar", 3),
        ("*/002.tar", 1),
        ("{000..001}.tar", 2),
        ("deep/{002..002}.tar", 1),
        ("001.tar", 1),
    ],
)
def test_tars_by_folder_pattern_and_braces(tars: Path, tmp_path: Path, pattern: str, expected: int) -> None:
    found = colours(build(tmp_path / "set", "--webdataset", tars / pattern))
    assert len(found) == expected and found == [colour for colour in COLOURS if colour in found]


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("{000..003}.tar", "002.tar, which"),
        ("{3..1}.tar", "stands for no name"),
        ("{0..99999999}.tar", "or for over"),
        ("x*.tar", "there is no shard"),
        ("none.tar", "there is no shard"),
    ],
)
def test_what_names_no_tar(
    tars: Path, tmp_path: Path, pattern: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build(tmp_path / "set", "--webdataset", tars / pattern)
    assert sentence in capsys.readouterr().err


def test_a_gzip_file_that_is_cut_off(
    lines: Path, tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = compress(lines, "lines.jsonl.gz")
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(SystemExit):
        build(tmp_path / "set", "--jsonl", packed)
    assert "lines.jsonl.gz is no whole gzip file" in capsys.readouterr().err
    (tars / "003.tgz").write_bytes(b"no gzip")
    out = build(tmp_path / "tars_set", "--webdataset", tars, "--max-reject-rate", "0.5")
    assert len(ShardSet(out)) == 3 and "003.tgz is no whole gzip file" in (out / "rejects.jsonl").read_text()


def test_a_zstd_file_that_is_cut_off(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, cut in enumerate((1, 40)):
        packed = compress(lines, "lines.jsonl.zst")
        packed.write_bytes(packed.read_bytes()[:-cut])
        with pytest.raises(SystemExit):
            build(tmp_path / f"set{number}", "--jsonl", packed)
        assert "lines.jsonl.zst is no whole zstd file" in capsys.readouterr().err


def test_zstd_without_what_reads_it(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = compress(lines, "lines.jsonl.zst")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SystemExit):
        build(tmp_path / "set", "--jsonl", packed)
    assert (
        "lines.jsonl.zst is compressed with zstd, which needs pyarrow; pip install pyarrow" in capsys.readouterr().err
    )


def test_a_tar_beside_its_compressed_copy_is_refused(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compress(tars / "001.tar", "001.tgz")
    with pytest.raises(SystemExit):
        build(tmp_path / "set", "--webdataset", tars)
    assert "001.tar and " in (said := capsys.readouterr().err) and "are two forms of one tar" in said
