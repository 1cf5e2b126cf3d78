"""Reading shards: any sample of a folder at random, from one read, with its checksum compared.

A folder holds NAME-000000.tar, ... and the index beside them (index.py). A sample is KEY.json and its pictures:
KEY.0.tile_1.jpg ... KEY.0.thumbnail.jpg for tiles cut in advance, KEY.0.jpg (or .png, .webp) for a whole image that is
tiled when read; a text-only sample is a KEY.json alone. Any WebDataset reader reads the tars.
"""

import os
import zlib
from collections import OrderedDict
from pathlib import Path

from megatron_nvlm.data.index import open_index
from megatron_nvlm.data.records import RawSample, parse_sample
from megatron_nvlm.data.write_shards import ShardWriter
from megatron_nvlm.errors import UserError

__all__ = ["RawSample", "ShardSet", "ShardWriter"]

MOST_OPEN_SHARDS = 64
"""Files that a reader keeps open; the order of samples reads few shards at a time."""


class ShardSet:
    """Reads any sample of a folder of shards; opening checks that every shard is there and whole.

    Args:
        check: look at every shard's size when opening; processes that come second need not.

    Raises:
        UserError: the folder has no index, a shard is missing or truncated, or index and shards disagree.
    """

    def __init__(self, folder: str | Path, check: bool = True) -> None:
        self.folder = Path(folder)
        self.index = open_index(self.folder)
        self.samples = self.index.samples
        self.shard_paths = [self.folder / shard["name"] for shard in self.index.shards]
        if check:
            for shard, path in zip(self.index.shards, self.shard_paths, strict=True):
                _check_size(path, int(shard["size"]))
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, number: int) -> RawSample:
        """Sample `number`, from one read of its shard.

        Raises:
            UserError: what stands there is no sample, or not the one that was written.
        """
        row = self.samples[number]
        shard = int(row["shard"])
        data = os.pread(self._open(shard), int(row["size"]), int(row["offset"]))
        try:
            if zlib.crc32(data) != int(row["crc32"]):
                raise UserError("its bytes are not those that were written")
            return parse_sample(data)
        except UserError as error:
            raise UserError(f"sample {number} of {self.shard_paths[shard]} cannot be read ({error})") from error

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= MOST_OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.shard_paths[shard], os.O_RDONLY)
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
