"""Each fault is named, of our sets and of plain WebDataset tars; a good set has none."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_nvlm.data.building.lint import Check, lint
from megatron_nvlm.data.order.lengths import TextTokenCounter
from megatron_nvlm.image.tiling import Grid
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.shards import cut_sample, good_samples, picture, record, write_samples

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [*good_samples(12), cut_sample(Grid(2, 1)), cut_sample(Grid(1, 1), Grid(3, 1))]
    return write_samples(tmp_path_factory.mktemp("good") / "set", samples, settings={"tile_size": 56})


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "set")
    return tmp_path / "set"


def kinds(folder: Path, **check: object) -> set[str]:
    return {fault.kind for fault in lint(folder, Check(**check)).faults}  # type: ignore[arg-type]


def test_a_good_set_has_no_fault(good: Path) -> None:
    for processes in (1, 2):
        found = lint(good, Check(), processes)
        assert found.faults == [] and found.num_samples == 14 and found.num_images == 15
    assert kinds(good, decode=False) == set()


def cut_off(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:5000])


def emptied(folder: Path) -> None:
    (folder / "shard-000000.tar").write_bytes(b"")


def flipped(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"\x89PNG") + 60] ^= 0xFF
    path.write_bytes(data)


def removed(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()


def index_flipped(folder: Path) -> None:
    path = folder / "index.json"
    path.write_text(path.read_text().replace('"num_samples": 14', '"num_samples": 15'))


def rows_flipped(folder: Path) -> None:
    path = folder / "samples.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def foreign_shard(folder: Path) -> None:
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000009.tar")


def left_over(folder: Path) -> None:
    (folder / "shard-000003.tar.partial").write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut_off, {"size", "unreadable", "changed"}),
        (emptied, {"size", "unreadable", "changed"}),
        (flipped, {"changed", "image", "index"}),
        (removed, {"missing"}),
        (index_flipped, {"index"}),
        (rows_flipped, {"index"}),
        (foreign_shard, {"not in index"}),
        (left_over, {"unfinished"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_found(folder: Path, damage: Callable[[Path], None], expected: set[str]) -> None:
    damage(folder)
    found = lint(folder, Check())
    assert {fault.kind for fault in found.faults} == expected
    assert all("\n" not in str(fault) and str(folder) in fault.place for fault in found.faults)


@pytest.mark.parametrize(
    ("sample", "kind", "says"),
    [
        ((record("?", "2"), {}), "record", "names 1 images and its pictures belong to 0"),
        ((record("? <image>", "2"), {"0.png": picture(9, 9)}), "placeholders", "has 2 <image> and it has 1 images"),
        ((record("?", " "), {"0.png": picture(9, 9)}), "conversation", "no answer"),
        (({"images": []}, {}), "record", "no conversation"),
        (
            (record("?", "2"), {"0.jpg": picture(90, 90, "JPEG")[:600]}),
            "image",
            "its 0.jpg: the image cannot be decoded",
        ),
        ((record("?", "2"), {"0.jpg": b"none"}), "image", "of no known format"),
        ((record("?", "2"), {"0.png": picture(9, 9), "0.jpg": picture(9, 9)}), "pictures", "0.png, 0.jpg; one was"),
        ((record("?", "2"), {"0.thumbnail.jpg": picture(56, 56)}), "pictures", "needs 'grid'"),
        (
            (record("?", "2") | {"images": [{"grid": [2, 1]}]}, {"0.thumbnail.jpg": picture(56, 56)}),
            "missing tile",
            "its 0.tile_1.jpg is missing",
        ),
        (
            (record("?", "2") | {"images": [{"grid": [1, 1]}]}, {"0.thumbnail.jpg": picture(50, 56)}),
            "tile size",
            "has 50x56 pixels and the set's tile_size is 56",
        ),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, sample: tuple[dict, dict], kind: str, says: str) -> None:  # type: ignore
    folder = write_samples(tmp_path / "set", [*good_samples(2), sample], settings={"tile_size": 56})
    faults = lint(folder, Check()).faults
    assert [fault.kind for fault in faults if says in fault.message] and kind in {fault.kind for fault in faults}
    assert all("sample_0002" in fault.place for fault in faults)


def test_token_counts_are_compared(tmp_path: Path) -> None:
    tokenizers = [Tokenizer(qwen2_tokenizer(size)) for size in (512, 1024)]
    counters = [TextTokenCounter(tokenizer, "chatml", None) for tokenizer in tokenizers]
    folder = write_samples(tmp_path / "set", good_samples(4), count_text=counters[0], text=counters[0].description)
    assert kinds(folder, count_text=counters[0]) == set()
    assert "text counts" in kinds(folder, count_text=counters[1])


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


IMAGE, TEXT = picture(20, 20, "JPEG"), b'{"caption": "x"}'


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a/ü.jpg", IMAGE), ("a/ü.json", TEXT), ("b.jpg", IMAGE), ("b.txt", b"x")], set()),
        ([("a.jpg", IMAGE), ("b.jpg", IMAGE), ("a.json", TEXT), ("b.json", TEXT)], {"duplicate key", "no text"}),
        ([("a.json", TEXT), ("a.json", TEXT)], {"duplicate member"}),
        ([("a.jpg", IMAGE)], {"no text"}),
        ([("a.jpg", IMAGE[:300]), ("a.json", TEXT)], {"image"}),
        ([("a.jpg", IMAGE), ("a.json", b"{")], {"json"}),
        ([("a.jpg", IMAGE), ("a.txt", b"\xff\xfe\xff")], {"text"}),
        ([("noext", TEXT), ("a.txt", b"x")], {"key"}),
        ([], {"empty"}),
    ],
)
def test_plain_webdataset(tmp_path: Path, members: list[tuple[str, bytes]], expected: set[str]) -> None:
    write_tar(tmp_path / "wds" / "0.tar", members)
    assert kinds(tmp_path / "wds") == expected


def test_plain_tars_that_are_cut_off_or_share_keys(tmp_path: Path) -> None:
    members = [(f"{number}.{suffix}", data) for number in range(5) for suffix, data in (("jpg", IMAGE), ("json", TEXT))]
    first = write_tar(tmp_path / "wds" / "0.tar", members)
    shutil.copy(first, tmp_path / "wds" / "1.tar")
    assert kinds(tmp_path / "wds") == {"duplicate key"}
    (tmp_path / "wds" / "1.tar").write_bytes(first.read_bytes()[:3000])
    assert "unreadable" in kinds(tmp_path / "wds")
    (tmp_path / "wds" / "1.tar").write_bytes(b"")
    assert kinds(tmp_path / "wds") == {"empty"}
    (tmp_path / "wds" / "1.tar").write_bytes(b"no tar at all" * 100)
    assert kinds(tmp_path / "wds") == {"unreadable"}
    assert kinds(tmp_path / "wds" / "0.tar") == set()


def test_the_command_says_it_and_returns_it(good: Path, folder: Path) -> None:
    flipped(folder)
    command = [sys.executable, "-m", "megatron_nvlm.commands.lint_shards", str(good), str(folder), "--processes", "1"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 1
    lines = shown.stdout.splitlines()
    assert lines[0] == f"{good}: 14 samples, 15 images, no fault"
    assert any("image: its 0.png" in line for line in lines) and "faults" in lines[-1]
    assert subprocess.run([*command[:4], *command[5:]], cwd=ROOT, capture_output=True).returncode == 0
    missing = subprocess.run([*command[:3], str(folder / "no")], cwd=ROOT, capture_output=True, text=True)
    assert missing.returncode == 2 and "error: there is no" in missing.stderr
    assert json.loads((good / "index.json").read_text())["num_samples"] == 14
