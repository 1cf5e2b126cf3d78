"""The index: what it says of a sample is what reading the sample gives, and what is wrong with it is said."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megatron_nvlm.data.order.lengths import LengthCounter, TextTokenCounter, check_counts
from megatron_nvlm.data.prepare import SamplePipeline
from megatron_nvlm.data.shards.index import IMAGES_FILE, INDEX_FILE, SAMPLES_FILE, ShardEntries, open_index, write_index
from megatron_nvlm.data.shards.read import ShardSet, ShardWriter
from megatron_nvlm.data.shards.write import index_folder, index_shard, shard_name, write_shard
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.tiling import Grid, TilingConfig
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.shards import Sample, cut_sample, good_samples, picture, record, write_samples


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(qwen2_tokenizer(1024))


def mixed_samples() -> list[Sample]:
    """Whole images, cut images, several, none, long text, and two broken ones."""
    samples = good_samples(12)
    samples += [cut_sample(Grid(3, 2)), cut_sample(Grid(1, 1)), cut_sample(Grid(2, 2), Grid(1, 3))]
    samples.append((record("word " * 120, "yes"), {"0.png": picture(600, 100)}))
    samples.append((record("?", "broken"), {"0.jpg": b"no picture"}))
    samples.append(({"images": [], "conversation": "none"}, {}))
    return samples


@pytest.mark.parametrize("variant", ["d", "x", "h"])
@pytest.mark.parametrize("tag_format", ["none", "1d", "2d_box"])
@pytest.mark.parametrize(("max_tiles", "sequence_length"), [(6, 4096), (6, 300), (12, 500), (1, 200)])
def test_rows_and_tiles_follow_from_the_index_alone(
    tmp_path: Path, tokenizer: Tokenizer, variant: str, tag_format: str, max_tiles: int, sequence_length: int
) -> None:
    counter = TextTokenCounter(tokenizer, "chatml", "Answer.")
    folder = write_samples(tmp_path / "shards", mixed_samples(), count_text=counter, text=counter.description)
    shards = ShardSet(folder)
    check_counts(shards.index, folder, counter.description)
    tiling = TilingConfig(tile_size=56, max_tiles=max_tiles, tag_format=tag_format)
    counted = LengthCounter(tokenizer, tiling, VARIANTS[variant], 4, sequence_length)
    sizes = counted.sizes(shards.index, range(len(shards)))
    pipeline = SamplePipeline(tokenizer, tiling, VARIANTS[variant], 4, sequence_length, "chatml", "Answer.")
    for number in range(len(shards)):
        try:
            prepared = pipeline.prepare(shards.read(number))
            expected = (len(prepared.sequence.tokens), len(prepared.tiles))
        except UserError:
            expected = (0, 0)
        assert (sizes.tokens[number], sizes.tiles[number]) == expected, shards.read(number).key
    assert (sizes.tokens > 0).sum() >= 14


def test_shards_written_apart_join_to_the_index_of_one_writer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    counter = TextTokenCounter(tokenizer, "chatml", None)
    samples = mixed_samples()
    one = write_samples(tmp_path / "one", samples, count_text=counter, text=counter.description)
    apart = tmp_path / "apart"
    apart.mkdir()
    rows = []
    for number in (2, 0, 1):  # in any order
        part = [(f"sample_{at:04d}", *samples[at]) for at in range(8 * number, min(8 * number + 8, len(samples)))]
        write_shard(apart / shard_name("shard", number), part, counter).save(tmp_path / f"{number}.rows")
    rows = [ShardEntries.load(tmp_path / f"{number}.rows") for number in range(3)]
    write_index(apart, rows, {}, counter.description)
    for name in (INDEX_FILE, SAMPLES_FILE, IMAGES_FILE, "shard-000001.tar"):
        assert (apart / name).read_bytes() == (one / name).read_bytes(), name


def test_shards_of_any_writer_are_indexed_anew(tmp_path: Path, tokenizer: Tokenizer) -> None:
    counter = TextTokenCounter(tokenizer, "chatml", None)
    folder = write_samples(tmp_path / "shards", mixed_samples(), count_text=counter, text=counter.description)
    before = {name: (folder / name).read_bytes() for name in (INDEX_FILE, SAMPLES_FILE, IMAGES_FILE)}
    (folder / INDEX_FILE).write_text(json.dumps({"format": 1, "settings": {}}))
    with pytest.raises(UserError, match="has format 1 and this version reads 2; build the shards again"):
        ShardSet(folder)
    index_folder(folder, count_text=counter, text=counter.description)
    assert {name: (folder / name).read_bytes() for name in before} == before
    with pytest.raises(UserError, match="cannot be read as a tar"):
        index_shard(folder / SAMPLES_FILE)


@pytest.mark.parametrize("name", [INDEX_FILE, SAMPLES_FILE, IMAGES_FILE])
def test_one_changed_byte_of_the_index_is_found(tmp_path: Path, name: str) -> None:
    folder = write_samples(tmp_path / "shards", good_samples(9))
    path = folder / name
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    for place in rng.integers(0, len(whole), 40):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        if name == INDEX_FILE and _same_json(whole, bytes(changed)):
            continue  # white space
        with pytest.raises(UserError):
            ShardSet(folder)
    path.write_bytes(whole[:-3])
    with pytest.raises(UserError):
        ShardSet(folder)
    path.unlink()
    with pytest.raises(UserError, match="build"):
        ShardSet(folder)


def _same_json(one: bytes, two: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(two))
    except ValueError:
        return False


def test_equal_keys_are_refused_within_a_shard_and_over_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'same' stands twice in"), ShardWriter(tmp_path / "one") as writer:
        writer.write("same", {}, {})
        writer.write("same", {}, {})
    assert list((tmp_path / "one").iterdir()) == []
    with (
        pytest.raises(UserError, match=r"shard-000000.tar and shard-000001.tar in .* samples of the same key"),
        ShardWriter(tmp_path / "two", samples_per_shard=1) as writer,
    ):
        writer.write("same", {}, {})
        writer.write("same", {}, {})


@pytest.mark.parametrize("cut", [100, 512 + 100])
def test_a_tar_that_ends_in_a_header_or_before_its_end_mark_is_refused(tmp_path: Path, cut: int) -> None:
    folder = write_samples(tmp_path / "shards", good_samples(8))
    path = next(folder.glob("*.tar"))
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    os.truncate(path, last.offset + cut)
    with pytest.raises(UserError, match="cannot be read as a tar"):
        index_shard(path)


def test_a_shard_ends_at_its_size(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shards", bytes_per_shard=40_000) as writer:
        for number, (content, pictures) in enumerate(good_samples(12)):
            writer.write(f"sample_{number}", content, pictures)
    shards = ShardSet(tmp_path / "shards")
    sizes = [int(shard["size"]) for shard in shards.index.shards]
    assert len(sizes) > 2 and all(size >= 40_000 for size in sizes[:-1])
    assert open_index(tmp_path / "shards", check_hashes=True).shard_sizes == [
        int((shards.samples["shard"] == number).sum()) for number in range(len(sizes))
    ]


def test_counts_of_another_tokenizer_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    counter = TextTokenCounter(tokenizer, "chatml", None)
    plain = ShardSet(write_samples(tmp_path / "plain", good_samples(3)))
    with pytest.raises(UserError, match="does not know the text tokens"):
        check_counts(plain.index, "shards", counter.description)
    counted = ShardSet(
        write_samples(tmp_path / "counted", good_samples(3), count_text=counter, text=counter.description)
    )
    other = TextTokenCounter(tokenizer, "chatml", "Answer.")
    with pytest.raises(UserError, match="was counted with data.system None and this run has 'Answer.'"):
        check_counts(counted.index, "shards", other.description)
