"""Reading shards: any sample of a folder at random, from one read, with its checksum compared.

A folder holds NAME-000000.tar, ... and the index beside them (index.py). A sample is KEY.json and its pictures:
KEY.0.tile_1.jpg ... KEY.0.thumbnail.jpg for tiles cut in advance, KEY.0.jpg (or .png, .webp) for a whole image that is
tiled when read; a text-only sample is a KEY.json alone. Any WebDataset reader reads the tars.
"""

import os
import time
import zlib
from collections import OrderedDict
from pathlib import Path

from megatron_nvlm.data.shards.index import INDEX_FILE, open_index
from megatron_nvlm.data.shards.records import RawSample, parse_sample
from megatron_nvlm.data.shards.remote import CacheConfig, RemoteFolder, StorageError, is_remote
from megatron_nvlm.data.shards.write import ShardWriter
from megatron_nvlm.errors import UserError

__all__ = ["RawSample", "ShardSet", "ShardWriter", "StorageError"]

MOST_OPEN_SHARDS = 64
"""Files that a reader keeps open; the order of samples reads few shards at a time."""


PAUSES = (0.1, 0.5, 2.0)
"""Seconds before a read that failed is tried again."""


class ShardSet:
    """Reads any sample of a folder of shards; opening checks that every shard is there and whole.

    Args:
        folder: or an address that fsspec knows (s3://, http://); its shards are then read by way of a cache.
        check: look at every shard's size when opening; processes that come second need not.

    Raises:
        UserError: the folder has no index, a shard is missing or truncated, or index and shards disagree.
    """

    def __init__(self, folder: str | Path, check: bool = True, cache: CacheConfig | None = None) -> None:
        self.location = str(folder)
        self._remote = RemoteFolder(self.location, cache or CacheConfig()) if is_remote(self.location) else None
        self.folder = self._remote.folder if self._remote else Path(folder)
        if self._remote and check:
            self._remote.fetch_index(INDEX_FILE)
        self.index = open_index(self.folder)
        self.samples = self.index.samples
        if check and not self._remote:
            for shard in self.index.shards:
                _check_size(self.folder / shard["name"], int(shard["size"]))
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, number: int) -> RawSample:
        """Sample `number`, from one read of its shard.

        Raises:
            StorageError: the shard cannot be reached.
            UserError: what stands there is no sample, or not the one that was written.
        """
        row = self.samples[number]
        shard = int(row["shard"])
        data = self._read(shard, int(row["offset"]), int(row["size"]))
        try:
            if zlib.crc32(data) != int(row["crc32"]):
                raise UserError("its bytes are not those that were written")
            return parse_sample(data)
        except UserError as error:
            raise UserError(
                f"sample {number} of {self.folder / self.shard_of(number)} cannot be read ({error})"
            ) from error

    def image_sizes(self, number: int) -> list[tuple[int, int]]:
        """(width, height) of each image of a sample, upright, from the index; (0, 0) where unknown."""
        first, count = int(self.samples[number]["first_image"]), int(self.samples[number]["num_images"])
        return [(width, height) for width, height, _, _ in self.index.images[first : first + count].tolist()]

    @property
    def shard_paths(self) -> list[Path]:
        """Files of the shards, in order."""
        return [self.folder / shard["name"] for shard in self.index.shards]

    @property
    def name(self) -> str:
        """The folder's name, for counts."""
        return self.location.rstrip("/").rpartition("/")[2]

    def shard_of(self, number: int) -> str:
        """File name of the shard that holds a sample."""
        return str(self.index.shards[int(self.samples[number]["shard"])]["name"])

    def _path(self, shard: int) -> Path:
        return self.folder / str(self.index.shards[shard]["name"])

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard; a file system that hiccups is asked again."""
        for pause in (*PAUSES, None):
            try:
                data = os.pread(self._open(shard), size, offset)
                if len(data) == size:
                    return data
                reason = f"it ends {size - len(data)} bytes too early"
            except OSError as error:
                reason = str(error)
            if shard in self._files:
                os.close(self._files.pop(shard))
            if pause is not None:
                time.sleep(pause)
        raise StorageError(
            f"the shard {self._path(shard)} cannot be read ({reason}); fix it or its file system and start again: "
            "the run goes on from its last checkpoint"
        )

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= MOST_OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        path, facts = self._path(shard), self.index.shards[shard]
        if self._remote:
            path = self._remote.fetch(facts["name"], int(facts["size"]), facts["sha256"])
        self._files[shard] = os.open(path, os.O_RDONLY)
        return self._files[shard]


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"the shard {path} is missing; copy or build it again")
    size = path.stat().st_size
    if size != expected:
        raise UserError(
            f"the shard {path} has {size} bytes and its index says {expected}: it is truncated or was changed; "
            "copy or build it again"
        )
