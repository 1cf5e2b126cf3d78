"""The index beside the shards, format 2: where each sample lies and how much work it is, without opening a shard.

    index.json    shards (name, size, sha256, num_samples), counts, settings, how text was counted, hashes of the rest
    samples.npy   one SAMPLE_DTYPE a sample, in the order of the shards; memory-mapped
    images.npy    one IMAGE_DTYPE an image, in the order of the samples; memory-mapped

From these alone follow the decoder tokens and tiles of every sample for any variant, tag format and limit of tiles
(row_counts.py), so that packing, reports and schedules decode nothing.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import megatron_nvlm
from megatron_nvlm.errors import UserError

INDEX_FILE = "index.json"
SAMPLES_FILE = "samples.npy"
IMAGES_FILE = "images.npy"
INDEX_FORMAT = 2
UNKNOWN_TOKENS = 0xFFFFFFFF
"""`num_text_tokens` of a sample whose text was not counted."""

SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("size", "<u4"),
        ("offset", "<u8"),
        ("first_image", "<u8"),
        ("num_images", "<u4"),
        ("num_tiles", "<u4"),
        ("num_text_tokens", "<u4"),
        ("crc32", "<u4"),
    ]
)
"""`num_tiles` counts tiles cut in advance, thumbnails included; images stored whole are tiled by the run's own limit and
add none. `num_text_tokens` are the decoder tokens that are no image's, in the template of index.json's `text`. `crc32` is
of the sample's bytes [offset, offset + size) in its shard."""

IMAGE_DTYPE = np.dtype([("width", "<u4"), ("height", "<u4"), ("cols", "<u2"), ("rows", "<u2")])
"""Size of the upright image (0 if unknown) and the grid of tiles cut in advance (0x0: stored whole)."""

_HASHED_ON_OPENING = 64 << 20
"""Bytes of samples.npy or images.npy up to which opening checks the hash; tools/lint_shards.py checks any."""


@dataclass(frozen=True)
class TextCounting:
    """How `num_text_tokens` was counted; another tokenizer, template or system turn gives other numbers."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    template: str
    system: str | None


@dataclass(frozen=True)
class ShardEntries:
    """What the index takes from one shard. `shard` and `first_image` of its rows count within the shard."""

    name: str
    size: int
    sha256: str
    samples: np.ndarray
    """SAMPLE_DTYPE [samples]."""
    images: np.ndarray
    """IMAGE_DTYPE [images]."""
    key_hashes: np.ndarray
    """uint64 [samples], by which keys that stand in two shards are found."""

    def save(self, path: str | Path) -> None:
        """Write to one file, all or nothing: a builder that was interrupted finds finished shards by it."""
        partial = Path(f"{path}.partial")
        with partial.open("wb") as file:
            header = json.dumps({"name": self.name, "size": self.size, "sha256": self.sha256})
            np.savez(file, header=header, samples=self.samples, images=self.images, key_hashes=self.key_hashes)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> "ShardEntries":
        """Read what `save` wrote; UserError if it is not that."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                header = json.loads(str(stored["header"]))
                return cls(**header, **{key: stored[key] for key in ("samples", "images", "key_hashes")})
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise UserError(f"{path} holds no rows of a shard ({error}); delete it and build again") from error


@dataclass(frozen=True)
class Index:
    """An opened index. `samples` and `images` are memory-mapped."""

    shards: tuple[Mapping[str, Any], ...]
    samples: np.ndarray
    images: np.ndarray
    settings: Mapping[str, Any]
    text: TextCounting | None
    """None if no text was counted."""
    content: Mapping[str, Any]
    """The whole index.json."""

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""
        return [int(shard["num_samples"]) for shard in self.shards]


def hash_key(key: str) -> int:
    """64 bits of a sample's key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def write_index(
    folder: str | Path,
    rows: Sequence[ShardEntries],
    settings: Mapping[str, Any] = {},
    text: TextCounting | None = None,
) -> None:
    """Join the rows of shards, in that order, to the index of a folder. The same rows give the same bytes.

    Args:
        settings: how the shards were made; `tile_size` is compared with the run's.
        text: how text was counted; None if it was not.

    Raises:
        UserError: there is no sample, or two have the same key.
    """
    folder = Path(folder)
    num_samples = sum(len(shard.samples) for shard in rows)
    num_images = sum(len(shard.images) for shard in rows)
    if num_samples == 0:
        raise UserError(f"there is no sample for {folder}; look at the messages of what was left out")
    _refuse_equal_keys(folder, rows)
    samples = _create(folder / SAMPLES_FILE, SAMPLE_DTYPE, num_samples)
    images = _create(folder / IMAGES_FILE, IMAGE_DTYPE, num_images)
    sample = image = tiles = tokens = 0
    for number, shard in enumerate(rows):
        part = shard.samples.copy()
        part["shard"] = number
        part["first_image"] += image
        samples[sample : sample + len(part)] = part
        images[image : image + len(shard.images)] = shard.images
        sample, image = sample + len(part), image + len(shard.images)
        tiles += int(part["num_tiles"].sum(dtype=np.int64))
        known = part["num_text_tokens"] != UNKNOWN_TOKENS
        tokens += int(part["num_text_tokens"][known].sum(dtype=np.int64))
    del samples, images  # closes the maps, so that the files below are what was written
    content: dict[str, Any] = {
        "format": INDEX_FORMAT,
        "tool": f"megatron_nvlm {megatron_nvlm.__version__}",
        "num_samples": num_samples,
        "num_images": num_images,
        "num_tiles": tiles,
        "num_text_tokens": tokens if text is not None else None,
        "settings": dict(settings),
        "text": asdict(text) if text is not None else None,
        "files": {name: _describe(Path(f"{folder / name}.partial")) for name in (SAMPLES_FILE, IMAGES_FILE)},
        "shards": [
            {"name": shard.name, "size": shard.size, "sha256": shard.sha256, "num_samples": len(shard.samples)}
            for shard in rows
        ],
    }
    partial = folder / f"{INDEX_FILE}.partial"
    partial.write_text(sign(json.dumps(content, indent=1)))
    for name in (SAMPLES_FILE, IMAGES_FILE, INDEX_FILE):
        os.replace(f"{folder / name}.partial", folder / name)


def open_index(folder: str | Path, check_hashes: bool = False) -> Index:
    """Open and check the index of a folder.

    Args:
        check_hashes: of samples.npy and images.npy, whatever their size.

    Raises:
        UserError: it is missing, of another format, or was changed since it was written.
    """
    folder = Path(folder)
    path = folder / INDEX_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is no folder of shards (there is no {INDEX_FILE}); build it again or correct data.train"
        )
    try:
        text = path.read_text()
        content = json.loads(text)
        version = content["format"]
        if version != INDEX_FORMAT:
            raise UserError(
                f"the index of {folder} has format {version} and this version reads {INDEX_FORMAT}; build the shards "
                "again with tools/build_shards.py, or index them again with megatron_nvlm.data.shards.write.index_folder"
            )
        if content.pop("checksum", None) is None or not is_signed(text):
            raise UserError(f"{path} was changed since it was written; build the shards again")
        for name, facts in content["files"].items():
            _check_file(folder / name, facts, check_hashes)
        samples = _map(folder / SAMPLES_FILE, SAMPLE_DTYPE)
        images = _map(folder / IMAGES_FILE, IMAGE_DTYPE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the index of {folder} cannot be read ({error}); build the shards again") from error
    shards = tuple(content["shards"])
    counted = sum(shard["num_samples"] for shard in shards)
    if not len(samples) == content["num_samples"] == counted or len(images) != content["num_images"]:
        raise UserError(
            f"the index of {folder} names {counted} samples and {SAMPLES_FILE} {len(samples)}; build the shards again"
        )
    counting = TextCounting(**content["text"]) if content["text"] is not None else None
    return Index(shards, samples, images, content["settings"], counting, content)


def _refuse_equal_keys(folder: Path, rows: Sequence[ShardEntries]) -> None:
    hashes = np.concatenate([shard.key_hashes for shard in rows])
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if len(equal):
        numbers = np.repeat(np.arange(len(rows)), [len(shard.samples) for shard in rows])
        first, second = (rows[numbers[order[equal[0] + step]]].name for step in (0, 1))
        raise UserError(f"{first} and {second} in {folder} hold samples of the same key; give each sample its own key")


def _create(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    """A new array on disk; memory-mapped unless empty, which cannot be mapped."""
    partial = f"{path}.partial"
    if length == 0:
        with open(partial, "wb") as file:
            np.save(file, np.zeros(0, dtype))
        return np.zeros(0, dtype)
    return np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=(length,))


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != dtype or array.ndim != 1:
        raise UserError(f"{path} holds {array.dtype} and not the fields of index format {INDEX_FORMAT}; build again")
    return array


def hash_file(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": hash_file(path)}


def _check_file(path: Path, facts: Mapping[str, Any], always: bool) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; copy or build the shards again")
    size = path.stat().st_size
    if size != facts["size"]:
        raise UserError(f"{path} has {size} bytes and {INDEX_FILE} says {facts['size']}; build the shards again")
    if (always or size <= _HASHED_ON_OPENING) and hash_file(path) != facts["sha256"]:
        raise UserError(f"{path} was changed since it was written; build the shards again")


_SIGNATURE = ',\n "checksum": "'


def sign(text: str) -> str:
    """A JSON object's text with, as its last key, the hash of what stands before."""
    body = text.rstrip().removesuffix("}").rstrip()
    return f'{body}{_SIGNATURE}{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def is_signed(text: str) -> bool:
    """Whether the text is as `sign` made it."""
    body, _, rest = text.rpartition(_SIGNATURE)
    return rest.partition('"')[0] == hashlib.sha256(body.encode()).hexdigest()
