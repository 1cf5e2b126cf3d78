"""Writing shards: one after the other with `ShardWriter`, or many processes with `write_shard` and one `write_index`.

    with ShardWriter(folder) as writer:                  # simple
        writer.write(key, record, pictures)

    rows = [write_shard(folder / shard_name("shard", number), part) for number, part in ...]   # any process, any order
    write_index(folder, rows, settings)                                                        # once, rows in order

A tar bears its name only when it is complete, and a folder is a set only when its index is written, so an interrupted
build is never taken for data. The same samples give the same bytes.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from megatron_nvlm.data.shards.index import (
    IMAGE_DTYPE,
    INDEX_FILE,
    SAMPLE_DTYPE,
    UNKNOWN_TOKENS,
    ShardEntries,
    TextCounting,
    hash_file,
    hash_key,
    write_index,
)
from megatron_nvlm.data.shards.records import RawSample, check_key, describe_images, is_whole, parse_sample
from megatron_nvlm.errors import UserError

CountText = Callable[[Mapping[str, Any]], int]
"""A record -> its decoder tokens that are no image's (row_counts.TextTokenCounter); may raise UserError: unknown then."""

MOST_SAMPLE_BYTES = 0xFFFFFFFF


def shard_name(name: str, number: int) -> str:
    """File name of the `number`-th shard."""
    return f"{name}-{number:06d}.tar"


def write_shard(
    path: str | Path,
    samples: Iterable[tuple[str, Mapping[str, Any], Mapping[str, bytes]]],
    count_text: CountText | None = None,
) -> ShardEntries:
    """Write one shard of (key, record, pictures), all or nothing, and return what the index takes from it.

    Raises:
        UserError: a key is not usable or stands there twice, or a record is no JSON; nothing is left at `path`.
    """
    tar = _OpenShard(Path(path), count_text)
    try:
        for key, record, pictures in samples:
            tar.add(key, record, pictures)
        return tar.close()
    except BaseException:
        tar.abandon()
        raise


def index_shard(path: str | Path, count_text: CountText | None = None) -> ShardEntries:
    """The rows of a shard that is there already, ours or not, from one pass over its members.

    Raises:
        UserError: it is no whole tar, or a sample in it is none.
    """
    path = Path(path)
    starts: list[int] = []
    previous = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key = member.name.partition(".")[0]
                if member.isfile() and key != previous:
                    starts.append(member.offset)
                    previous = key
            end = tar.offset
            check_tar_end(path, end)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a tar ({error}); copy or build it again") from error
    entries = _Entries(count_text)
    with path.open("rb") as file:
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            file.seek(start)
            data = file.read(stop - start)
            try:
                sample = parse_sample(data)
            except UserError as error:
                raise UserError(f"the sample at byte {start} of {path} cannot be read ({error})") from error
            entries.add(sample, start, stop - start, zlib.crc32(data))
    return entries.finish(path.name, path.stat().st_size, hash_file(path))


def check_tar_end(tar: Path, offset: int) -> None:
    """Python's reader takes a broken or cut-off header after the first for the end; the real end is a block of zeros.

    Raises:
        tarfile.ReadError: there is no such block.
    """
    with tar.open("rb") as file:
        file.seek(offset)
        if file.read(512) != bytes(512):
            raise tarfile.ReadError(f"neither a member nor the end mark stands at byte {offset}")


def index_folder(
    folder: str | Path,
    settings: Mapping[str, Any] | None = None,
    count_text: CountText | None = None,
    text: TextCounting | None = None,
) -> None:
    """Index all tars of a folder again: shards of other writers, of format 1, or for another tokenizer.

    Args:
        settings: of the new index; None keeps those of an index that is there.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if settings is None:
        try:
            settings = json.loads((folder / INDEX_FILE).read_text())["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            settings = {}
    write_index(folder, [index_shard(path, count_text) for path in paths], settings or {}, text)


class ShardWriter:
    """Writes samples into shards of a folder, one process. Use as a context manager.

    Args:
        folder: created; must not hold an index already. Leftovers of an interrupted writer are replaced.
        samples_per_shard: a new tar is begun after this number,
        bytes_per_shard: or when this many are in it; None for no such limit.
        settings: written into the index; `tile_size` is compared with the run's.
        count_text, text: how text is counted, both or neither.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str = "shard",
        samples_per_shard: int = 1000,
        settings: Mapping[str, Any] = {},
        *,
        bytes_per_shard: int | None = None,
        count_text: CountText | None = None,
        text: TextCounting | None = None,
    ) -> None:
        self.folder, self.name = Path(folder), name
        self.samples_per_shard, self.bytes_per_shard = samples_per_shard, bytes_per_shard
        self.settings, self.count_text, self.text = dict(settings), count_text, text
        self._rows: list[ShardEntries] = []
        self._shard: _OpenShard | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / INDEX_FILE).exists():
            raise UserError(f"{self.folder} already holds shards; write into an empty folder")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # without an index an unfinished folder is no set
            if self._shard is not None:
                self._shard.abandon()
            return
        self._close_shard()
        write_index(self.folder, self._rows, self.settings, self.text)

    def write(self, key: str, record: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
        """Append a sample; `key` holds no dot and no slash (WebDataset splits names at the first dot)."""
        if self._shard is not None and self._is_full(self._shard):
            self._close_shard()
        if self._shard is None:
            path = self.folder / shard_name(self.name, len(self._rows))
            self._shard = _OpenShard(path, self.count_text)
        self._shard.add(key, record, pictures)

    def _is_full(self, shard: "_OpenShard") -> bool:
        by_bytes = self.bytes_per_shard is not None and shard.size >= self.bytes_per_shard
        return by_bytes or shard.num_samples >= self.samples_per_shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._rows.append(self._shard.close())
            self._shard = None


class _Entries:
    """Rows of a shard as they grow."""

    def __init__(self, count_text: CountText | None) -> None:
        self.count_text = count_text
        self.samples: list[tuple[int, ...]] = []
        self.images: list[tuple[int, int, int, int]] = []
        self.keys: set[str] = set()
        self.key_hashes: list[int] = []

    def add(self, sample: RawSample, offset: int, size: int, crc32: int) -> None:
        images = describe_images(sample.record, sample.pictures)
        tiles = sum(not is_whole(name) for name in sample.pictures)
        tokens = UNKNOWN_TOKENS
        if self.count_text is not None:
            try:
                tokens = self.count_text(sample.record)
            except UserError:  # a sample that training will count as bad has no length either
                tokens = UNKNOWN_TOKENS
        self.samples.append((0, size, offset, len(self.images), len(images), tiles, tokens, crc32))
        self.images += [(image.width, image.height, image.cols, image.rows) for image in images]
        self.keys.add(sample.key)
        self.key_hashes.append(hash_key(sample.key))

    def finish(self, name: str, size: int, sha256: str) -> ShardEntries:
        samples = np.array(self.samples, dtype=SAMPLE_DTYPE)
        images = np.array(self.images, dtype=IMAGE_DTYPE)
        return ShardEntries(name, size, sha256, samples, images, np.array(self.key_hashes, dtype=np.uint64))


class _HashingFile:
    """What tarfile writes to: counts and hashes on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.crc32 = file, 0, 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


class _OpenShard:
    """A shard that is being written, under a name that no reader takes for a shard."""

    def __init__(self, path: Path, count_text: CountText | None) -> None:
        self.path, self.partial = path, Path(f"{path}.partial")
        self.entries = _Entries(count_text)
        self._file = self.partial.open("wb")
        self._out = _HashingFile(self._file)
        self._tar = tarfile.open(fileobj=self._out, mode="w:", format=tarfile.PAX_FORMAT)  # type: ignore[call-overload]

    @property
    def size(self) -> int:
        return self._out.size

    @property
    def num_samples(self) -> int:
        return len(self.entries.samples)

    def add(self, key: str, record: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
        check_key(key)
        if key in self.entries.keys:
            raise UserError(f"the sample key {key!r} stands twice in {self.path}; give each sample its own key")
        try:
            encoded = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
        except (TypeError, ValueError) as error:
            raise UserError(f"the record of sample {key} is no JSON ({error}); correct or drop it") from error
        if len(encoded) + sum(map(len, pictures.values())) > MOST_SAMPLE_BYTES // 2:
            raise UserError(f"sample {key} is over {MOST_SAMPLE_BYTES // 2} bytes; scale its pictures down or drop it")
        start = self._out.size
        self._out.crc32 = 0
        self._add(f"{key}.json", encoded)
        for name, data in pictures.items():
            self._add(f"{key}.{name}", data)
        sample = RawSample(key, dict(record), dict(pictures))
        self.entries.add(sample, start, self._out.size - start, self._out.crc32)

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self._tar.addfile(info, io.BytesIO(data))

    def close(self) -> ShardEntries:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.partial, self.path)
        return self.entries.finish(self.path.name, self._out.size, self._out.sha256.hexdigest())

    def abandon(self) -> None:
        self._file.close()
        self.partial.unlink(missing_ok=True)
