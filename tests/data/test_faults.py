"""The fault campaign: whatever is broken, the loader does not hang, gives no wrong sample, and loses none in silence.

Each fault is done to a good set. Either opening refuses it in one sentence, or an epoch is drawn: the samples that come are
those that were written, and with the bad samples that are counted they make up the set.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_nvlm.data.loading.builder import BatchSettings
from megatron_nvlm.data.loading.fetch import BadRecord
from megatron_nvlm.data.loading.loader import MicroBatchLoader
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.data.shards.index import IMAGES_FILE, INDEX_FILE, SAMPLES_FILE
from megatron_nvlm.data.shards.read import ShardSet, ShardWriter
from megatron_nvlm.data.shards.write import index_folder
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.tiling import Grid
from megatron_nvlm.sequence.micro_batch import MicroBatch
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.loaders import data_config, open_set
from tests.support.shards import Sample, cut_sample, picture, record, write_samples

COUNT = 24


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(qwen2_tokenizer(1024))


def plain_samples() -> list[Sample]:
    """Whole JPEGs, cut images and text, each with an answer of its own."""
    samples: list[Sample] = []
    for number in range(COUNT):
        if number % 3 == 0:
            content, pictures = cut_sample(Grid(2, 1))
        elif number % 3 == 1:
            content, pictures = record("?", ""), {"0.jpg": picture(60, 60, "JPEG", seed=number)}
        else:
            content, pictures = record("?", "", images=0), {}
        content["conversation"][1]["value"] = f"answer {number}"
        samples.append((content, pictures))
    return samples


def draw_epoch(folder: Path, tokenizer: Tokenizer, workers: int = 0) -> tuple[dict[str, MicroBatch], list[BadRecord]]:
    """Good samples of an epoch by key, and the bad ones."""
    data = open_set(folder, tokenizer)
    loader = MicroBatchLoader(data, BatchSettings(1, len(data.sets[0])), data_config(num_workers=workers))
    try:
        rows = [row for row in loader.step(DataPosition()) if row.keys]
        return {row.keys[0]: row for row in rows}, loader.bad
    finally:
        loader.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> tuple[Path, dict[str, MicroBatch]]:
    folder = write_samples(tmp_path_factory.mktemp("good") / "shards", plain_samples())
    rows, bad = draw_epoch(folder, tokenizer)
    assert len(rows) == COUNT and not bad
    return folder, rows


def flip(path: Path, place: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def member(folder: Path, name: str) -> tuple[Path, int, int]:
    """Shard, first byte and size of a member's content."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for found in tar:
                if found.name == name:
                    return path, found.offset_data, found.size
    raise AssertionError(name)


def flip_in_member(name: str) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        path, start, size = member(folder, name)
        flip(path, start + size // 2)

    return fault


def flip_header(folder: Path) -> None:
    path, start, _ = member(folder, "sample_0010.json")
    flip(path, start - 512)  # the first letter of its name


def zero_content(folder: Path) -> None:
    path, start, size = member(folder, "sample_0004.0.jpg")
    data = path.read_bytes()
    path.write_bytes(data[:start] + bytes(size) + data[start + size :])


def swap_shards_of_one_size(folder: Path) -> None:
    """The bytes of shard 1 under the name of shard 0, at the size that the index expects."""
    first, second = folder / "shard-000000.tar", folder / "shard-000001.tar"
    size = first.stat().st_size
    first.write_bytes((second.read_bytes() + bytes(size))[:size])


BAD_SAMPLES: dict[str, tuple[Callable[[Path], None], set[int]]] = {
    "flipped byte in a JPEG": (flip_in_member("sample_0007.0.jpg"), {7}),
    "flipped byte in a tile": (flip_in_member("sample_0009.0.tile_2.jpg"), {9}),
    "flipped byte in a JSON": (flip_in_member("sample_0020.json"), {20}),
    "flipped byte in a tar header": (flip_header, {10}),
    "zeros in a JPEG": (zero_content, {4}),
    "another shard's bytes": (swap_shards_of_one_size, set(range(8))),
}


@pytest.mark.parametrize(("fault", "workers"), [*((fault, 0) for fault in BAD_SAMPLES), ("flipped byte in a JPEG", 1)])
def test_damage_is_counted_and_the_rest_comes_unharmed(
    good: tuple[Path, dict[str, MicroBatch]], tmp_path: Path, tokenizer: Tokenizer, fault: str, workers: int
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(good[0], folder)
    do, expected = BAD_SAMPLES[fault]
    do(folder)
    rows, bad = draw_epoch(folder, tokenizer, workers)
    assert {found.number for found in bad} == expected and len(bad) == len(expected)
    assert all(found.kind == "record" and found.reason and found.shard.endswith(".tar") for found in bad)
    assert set(rows) == {f"sample_{number:04d}" for number in range(COUNT) if number not in expected}
    for key, row in rows.items():
        assert row.tokens.equal(good[1][key].tokens) and row.tiles.equal(good[1][key].tiles)


def truncate(name: str, by: int) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-by])

    return fault


def empty(folder: Path) -> None:
    (folder / "shard-000001.tar").write_bytes(b"")


def folder_in_place_of_a_shard(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()
    (folder / "shard-000001.tar").mkdir()


def index_of_another_set(folder: Path) -> None:
    other = write_samples(folder.parent / "other", plain_samples()[::-1])
    for name in (INDEX_FILE, SAMPLES_FILE, IMAGES_FILE):
        shutil.copy(other / name, folder / name)


def rows_of_another_set(folder: Path) -> None:
    other = write_samples(folder.parent / "other", plain_samples()[::-1])
    shutil.copy(other / SAMPLES_FILE, folder / SAMPLES_FILE)


def index_that_is_a_list(folder: Path) -> None:
    (folder / INDEX_FILE).write_text("[1, 2]")


def index_without_a_key(folder: Path) -> None:
    content = json.loads((folder / INDEX_FILE).read_text())
    del content["shards"]
    (folder / INDEX_FILE).write_text(json.dumps(content))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated tar": (truncate("shard-000002.tar", 700), "shard-000002.tar has .* truncated or was changed"),
    "zero-byte shard": (empty, "shard-000001.tar has 0 bytes"),
    "unreadable shard": (folder_in_place_of_a_shard, "shard-000001.tar is missing"),
    "flipped byte in index.json": (lambda folder: flip(folder / INDEX_FILE, 200), "index"),
    "flipped byte in samples.npy": (lambda folder: flip(folder / SAMPLES_FILE, 300), "samples.npy was changed"),
    "flipped byte in images.npy": (lambda folder: flip(folder / IMAGES_FILE, 150), "images.npy was changed"),
    "truncated samples.npy": (truncate(SAMPLES_FILE, 8), "samples.npy has .* bytes and index.json says"),
    "wrong index": (index_of_another_set, r"truncated or was changed"),
    "wrong rows": (rows_of_another_set, "samples.npy was changed"),
    "index that is a list": (index_that_is_a_list, "cannot be read"),
    "index without shards": (index_without_a_key, "was changed since it was written"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_set_that_cannot_be_whole_is_refused(good: tuple[Path, dict], tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(good[0], folder)
    do, says = REFUSED[fault]
    do(folder)
    with pytest.raises(UserError, match=says) as caught:
        ShardSet(folder)
    assert "\n" not in str(caught.value)


def bomb(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def test_samples_that_are_bad_by_content_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Missing members, images too large to decode, text too long; a 100-megapixel image is large and no fault."""
    samples = plain_samples()[:16]
    samples[0] = (samples[0][0], {k: v for k, v in samples[0][1].items() if "tile_1" not in k})
    samples[1] = (record("?", "no picture"), {})
    samples[2] = (record("?", "100 megapixels"), {"0.png": bomb(10_000)})
    samples[3] = (record("?", "196 megapixels"), {"0.png": bomb(14_000)})
    samples[4] = (record("<image>?", "two places"), {"0.jpg": picture(60, 60, "JPEG")})
    samples[5] = (record("long " * 500, "text", images=0), {})
    samples[6] = (record("?", "no image format"), {"0.webp": b"RIFF"})
    rows, bad = draw_epoch(write_samples(tmp_path / "shards", samples), tokenizer)
    assert {(found.number, found.kind) for found in bad} == {
        (0, "image"),
        (1, "record"),
        (3, "image"),
        (4, "conversation"),
        (5, "too_long"),
        (6, "image"),
    }
    assert len(rows) + len(bad) == 16 and "sample_0002" in rows


def test_keys_of_any_alphabet_and_no_slash(tmp_path: Path, tokenizer: Tokenizer) -> None:
    keys = ["Ünïcödé", "图像 1", "emoji_😀", "x" * 300, "with space", "back\\slash"]
    with ShardWriter(tmp_path / "shards") as writer:
        for key, (content, pictures) in zip(keys, plain_samples(), strict=False):
            writer.write(key, content, pictures)
        for key in ("a/b", "../up", "a.b", ""):
            with pytest.raises(UserError, match="must hold neither dot nor slash"):
                writer.write(key, {}, {})
    rows, bad = draw_epoch(tmp_path / "shards", tokenizer)
    assert set(rows) == set(keys) and not bad
    assert ShardSet(tmp_path / "shards").read(1).key == keys[1]


def test_a_duplicated_key_in_a_shard_of_another_writer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for names in (["a.json", "a.json"], ["a.json", "b.json", "a.json"]):
        with tarfile.open(folder / "shard-000000.tar", "w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 2
                tar.addfile(info, io.BytesIO(b"{}"))
        with pytest.raises(UserError, match="twice|same key"):
            index_folder(folder)


def test_any_flipped_byte_of_a_shard_is_noticed(good: tuple[Path, dict[str, MicroBatch]], tmp_path: Path) -> None:
    """Wherever a bit flips: the sample that it belongs to cannot be read, or nothing was hit but the end of the tar."""
    folder = tmp_path / "shards"
    shutil.copytree(good[0], folder)
    path = folder / "shard-000000.tar"
    whole = path.read_bytes()
    intact = [ShardSet(folder).read(number) for number in range(8)]
    end = int(ShardSet(folder).samples[7]["offset"]) + int(ShardSet(folder).samples[7]["size"])
    rng = np.random.default_rng(0)
    for place in rng.integers(0, end, 60).tolist():
        flip(path, place)
        shards = ShardSet(folder)
        hit = int(np.searchsorted(shards.samples["offset"][:8], place, side="right")) - 1
        for number in range(8):
            if number == hit:
                with pytest.raises(UserError, match="cannot be read"):
                    shards.read(number)
            else:
                assert shards.read(number) == intact[number]
        path.write_bytes(whole)
