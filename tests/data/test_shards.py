"""Shards on disk: what goes in comes out, other readers read them, and what is broken is named."""

import tarfile
from pathlib import Path

import pytest
import webdataset

from megatron_nvlm.data.shards.read import ShardSet, ShardWriter
from megatron_nvlm.errors import UserError
from tests.support.shards import good_samples, write_samples


def test_any_sample_comes_back(tmp_path: Path) -> None:
    samples = good_samples(20)
    shards = ShardSet(write_samples(tmp_path / "shards", samples))
    assert len(shards) == 20 and len(shards.shard_paths) == 3
    for number in (19, 0, 8, 7):
        raw = shards.read(number)
        assert raw.key == f"sample_{number:04d}"
        assert (raw.record, raw.pictures) == samples[number]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    one = ShardSet(write_samples(tmp_path / "one", good_samples(9)))
    two = ShardSet(write_samples(tmp_path / "two", good_samples(9)))
    assert one.index.content == two.index.content


def test_webdataset_reads_the_tars(tmp_path: Path) -> None:
    samples = good_samples(12)
    folder = write_samples(tmp_path / "shards", samples)
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == [f"sample_{number:04d}" for number in range(12)]
    assert [sample["json"] for sample in read] == [record for record, _ in samples]
    assert read[0]["0.png"] is not None


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "shards", good_samples(20))
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"the shard .*shard-000001.tar is missing"):
        ShardSet(folder)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "shards", good_samples(20))
    path = folder / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(UserError, match=r"shard-000002.tar has \d+ bytes and its index says \d+: it is truncated"):
        ShardSet(folder)


def test_a_folder_without_an_index_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no folder of shards \(there is no index.json\)"):
        ShardSet(tmp_path)


def test_an_interrupted_writer_leaves_no_set(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "shards") as writer:
        writer.write("one", {"conversation": []}, {})
        raise ZeroDivisionError
    with pytest.raises(UserError, match="is no folder of shards"):
        ShardSet(tmp_path / "shards")


def test_overwritten_bytes_are_a_bad_sample(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "shards", good_samples(4))
    path = folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[:512] = b"\xff" * 512
    path.write_bytes(data)
    with pytest.raises(UserError, match="sample 0 of .*shard-000000.tar cannot be read"):
        ShardSet(folder).read(0)
    assert ShardSet(folder).read(1).key == "sample_0001"


def test_keys_that_webdataset_would_split_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shards") as writer:
        with pytest.raises(UserError, match="must hold neither dot nor slash"):
            writer.write("a.b", {}, {})
        writer.write("ab", {}, {})
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as tar:
        assert tar.getnames() == ["ab.json"]
