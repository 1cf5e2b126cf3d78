"""Shards: WebDataset tars with an index beside them, written once and read at random.

A folder holds NAME-000000.tar, ..., `index.json` (shards with sizes and hashes, tiling, counts) and `samples.npy` (where
each sample lies). A sample is KEY.json and its pictures: KEY.0.tile_1.jpg ... KEY.0.thumbnail.jpg for tiles cut in
advance, KEY.0.jpg (or .png) for a whole image that is tiled when read; a text-only sample is a KEY.json alone.
Any WebDataset reader reads the tars; this file adds access to sample number i without reading what comes before.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_nvlm.errors import UserError

INDEX_FILE = "index.json"
SAMPLES_FILE = "samples.npy"
INDEX_FORMAT = 1
SAMPLE_DTYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u8"), ("num_tiles", "<u2")])


@dataclass(frozen=True)
class RawSample:
    """A sample as stored: its key, its JSON, and its pictures by the name behind the key (`0.tile_1.jpg`)."""

    key: str
    record: dict[str, Any]
    pictures: dict[str, bytes]


class ShardWriter:
    """Writes samples into shards; the same samples give the same bytes. Use as a context manager.

    Args:
        folder: created; must not hold shards already.
        samples_per_shard: a new tar is begun after so many.
        settings: written into the index, for whoever wonders how the shards were made.
    """

    def __init__(
        self, folder: str | Path, name: str = "shard", samples_per_shard: int = 1000, settings: Mapping[str, Any] = {}
    ) -> None:
        self.folder = Path(folder)
        self.name = name
        self.samples_per_shard = samples_per_shard
        self.settings = dict(settings)
        self.rows: list[tuple[int, int, int, int]] = []
        self.shards: list[dict[str, Any]] = []
        self._tar: tarfile.TarFile | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / INDEX_FILE).exists():
            raise UserError(f"{self.folder} already holds shards; write into an empty folder")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_shard()
        if kind is None:  # without an index an unfinished folder is no data set
            self._write_index()

    def write(self, key: str, record: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
        """Append a sample; `key` holds no dot and no slash (WebDataset splits names at the first dot)."""
        if "." in key or "/" in key or not key:
            raise UserError(f"the sample key {key!r} must hold neither dot nor slash")
        if self._tar is None or len(self.rows) % self.samples_per_shard == 0:
            self._open_shard()
        assert self._tar is not None
        start = self._tar.offset
        encoded = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
        self._add(f"{key}.json", encoded)
        for name, data in pictures.items():
            self._add(f"{key}.{name}", data)
        self.rows.append((len(self.shards), start, self._tar.offset - start, len(pictures)))

    def _add(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self._tar.addfile(info, io.BytesIO(data))

    def _open_shard(self) -> None:
        self._close_shard()
        self._path = self.folder / f"{self.name}-{len(self.shards):06d}.tar"
        self._tar = tarfile.open(f"{self._path}.partial", "w:", format=tarfile.PAX_FORMAT)

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        partial = Path(f"{self._path}.partial")
        data = partial.read_bytes()
        os.replace(partial, self._path)
        digest = hashlib.sha256(data).hexdigest()
        self.shards.append({"name": self._path.name, "size": len(data), "sha256": digest})

    def _write_index(self) -> None:
        np.save(self.folder / SAMPLES_FILE, np.array(self.rows, dtype=SAMPLE_DTYPE))
        index = {
            "format": INDEX_FORMAT,
            "num_samples": len(self.rows),
            "shards": self.shards,
            "settings": self.settings,
        }
        partial = self.folder / f"{INDEX_FILE}.partial"
        partial.write_text(json.dumps(index, indent=1) + "\n")
        os.replace(partial, self.folder / INDEX_FILE)


class ShardSet:
    """Reads any sample of a folder of shards; opening checks that every shard is there and whole.

    Raises:
        UserError: the folder has no index, a shard is missing or truncated, or index and shards disagree.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX_FILE
        if not path.is_file():
            raise UserError(
                f"{self.folder} is no folder of shards (there is no {INDEX_FILE}); build it again or correct data.train"
            )
        try:
            self.index: dict[str, Any] = json.loads(path.read_text())
            self.samples = np.load(self.folder / SAMPLES_FILE, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"the index of {self.folder} cannot be read ({error}); build the shards again") from error
        if len(self.samples) != self.index["num_samples"] or len(self.samples) == 0:
            raise UserError(
                f"the index of {self.folder} names {self.index['num_samples']} samples and {SAMPLES_FILE} "
                f"{len(self.samples)}; build the shards again"
            )
        self.shard_paths = [self.folder / shard["name"] for shard in self.index["shards"]]
        for shard, shard_path in zip(self.index["shards"], self.shard_paths, strict=True):
            if not shard_path.is_file():
                raise UserError(f"the shard {shard_path} is missing; copy or build it again")
            size = shard_path.stat().st_size
            if size != shard["size"]:
                raise UserError(
                    f"the shard {shard_path} has {size} bytes and its index says {shard['size']}: it is truncated or "
                    "was changed; copy or build it again"
                )
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, number: int) -> RawSample:
        """Sample `number`, from one read of its shard.

        Raises:
            UserError: what stands there is no sample.
        """
        row = self.samples[number]
        shard = int(row["shard"])
        if shard not in self._files:
            self._files[shard] = os.open(self.shard_paths[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], int(row["size"]), int(row["offset"]))
        try:
            return _parse(data)
        except (tarfile.TarError, ValueError, KeyError, EOFError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"sample {number} of {self.shard_paths[shard]} cannot be read ({error})") from error


def _parse(data: bytes) -> RawSample:
    """The members of one sample, as bytes of a tar without its end."""
    key, record = None, None
    pictures: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            member_key, _, rest = member.name.partition(".")
            content = tar.extractfile(member)
            if content is None:
                continue
            key = key or member_key
            if member_key != key:
                raise UserError(f"samples {key} and {member_key} run into each other; build the shards again")
            if rest == "json":
                record = json.load(content)
            else:
                pictures[rest] = content.read()
    if key is None or not isinstance(record, dict):
        raise UserError(f"the sample {key} has no JSON")
    return RawSample(key, record, pictures)
