"""WebDataset tars in and out: those of other writers, our own again, and other readers of ours."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megatron_nvlm.data.shards.read import ShardSet
from tests.commands.shard_builds import build, material, tokenizer
from tests.support.shards import picture

__all__ = ["material", "tokenizer"]


def test_from_webdataset_of_others(tmp_path: Path) -> None:
    """Folders in keys, captions as .txt, several images, a broken tar among whole ones."""
    source = tmp_path / "wds"
    source.mkdir()

    def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(source / "000.tar", "w") as tar:
        add(tar, "a/ü1.jpg", picture(60, 60, "JPEG"))
        add(tar, "a/ü1.txt", b"A square")
        add(tar, "b.v2/2.json", json.dumps({"question": "Which?", "answer": "this"}).encode())
        for number in (10, 2):
            add(tar, f"b.v2/2.{number}.png", picture(40 + number, 50))
    with tarfile.open(source / "001.tar", "w") as tar:
        for number in range(3):
            add(tar, f"{number}.json", b'{"text": "words"}')
    whole = (source / "001.tar").read_bytes()
    (source / "002.tar").write_bytes(whole[: 3 * 1024 + 200].replace(b"words", b"drows"))
    folder = build(
        tmp_path, "set", "--images", "whole", "--max-reject-rate", "0.2", source=("--webdataset", str(source))
    )
    shards = ShardSet(folder)
    samples = [shards.read(number) for number in range(len(shards))]
    assert [sample.record["id"] for sample in samples[:2]] == ["a/ü1", "b.v2/2"]
    assert samples[0].record["conversation"][1]["value"] == "A square"
    assert [image["width"] for image in samples[1].record["images"]] == [42, 50]  # 2 before 10
    rejects = (folder / "rejects.jsonl").read_text()
    assert "002.tar is broken or cut off" in rejects


def test_from_our_own_shards(material: Path, tokenizer: Path) -> None:
    """Tiles pass unchanged, whole images are cut, and what was cut is not cut again."""
    tiles = build(material, "tiles", "--tokenizer", str(tokenizer))
    again = build(material, "again", "--samples-per-shard", "9", source=("--webdataset", str(tiles)))
    first, second = ShardSet(tiles), ShardSet(again)
    assert len(first) == len(second) == 26
    for number in range(26):
        one, two = first.read(number), second.read(number)
        assert one.pictures == two.pictures
        assert {**one.record, "id": 0, "source": 0} == {**two.record, "id": 0, "source": 0}
    whole = build(material, "whole", "--images", "whole")
    assert [
        dict(s.pictures) for s in (ShardSet(build(material, "cut", source=("--webdataset", str(whole)))).read(0),)
    ] == [first.read(0).pictures]
    with pytest.raises(SystemExit):
        build(material, "no", "--images", "whole", source=("--webdataset", str(tiles)))


def test_plain_webdataset_reads_our_shards(material: Path) -> None:
    folder = build(material, "set")
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"set-{number:09d}" for number in range(26)]
    assert samples[0]["json"]["images"][0]["grid"] == [3, 2]
    assert samples[0]["0.tile_1.jpg"].shape == (56, 56, 3) and samples[0]["0.thumbnail.jpg"].dtype == np.uint8
