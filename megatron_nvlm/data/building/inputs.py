"""What shards are built from: JSON lines, a folder of images, WebDataset shards. Each a numbered list of samples.

Opening an input looks at all of it once, so that any sample is reached by its number from any process.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_nvlm.data.building.forms import image_paths
from megatron_nvlm.data.shards.write import check_tar_end
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import MAX_PIXELS

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MOST_FILE_BYTES = 4 * MAX_PIXELS
"""A larger file is no image that could be used."""


@dataclass(frozen=True)
class InputSample:
    """A sample as it was found."""

    content: Mapping[str, Any]
    """Its JSON, in one of the forms of forms.py."""
    images: list[bytes]
    """Its image files, in order."""
    cut_tiles: Mapping[str, bytes]
    """Tiles that stood there cut in advance, by their names in our shards; instead of `images`."""


class Input(Protocol):
    """A numbered list of samples."""

    path: Path
    kind: str
    faults: list[str]
    """What could not even be numbered: sentences."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Hash that changes if the list does."""

    def where(self, number: int) -> str:
        """Place of a sample, for messages."""

    def read(self, number: int) -> InputSample:
        """The sample; UserError if it is none."""


class JsonLines:
    """A file with one JSON object a line; paths of images are relative to `images`."""

    kind = "jsonl"

    def __init__(self, path: Path, images: Path | None = None) -> None:
        if not path.is_file():
            raise UserError(f"there is no file {path}; correct --jsonl")
        self.path, self.images, self.faults = path, images or path.parent, list[str]()
        starts, lines, digest, offset = array("q"), array("q"), hashlib.sha256(), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    starts.append(offset)
                    lines.append(number)
                digest.update(line)
                offset += len(line)
        self.starts, self.lines = np.array(starts), np.array(lines)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, number: int) -> str:
        """Place of a sample, for messages."""
        return f"{self.path} line {self.lines[number]}"

    def read(self, number: int) -> InputSample:
        """The sample; UserError if it is none."""
        with self.path.open("rb") as file:
            file.seek(int(self.starts[number]))
            line = file.readline()
        content = _parse_json(line)
        return InputSample(content, [_read_image(self.images / path) for path in image_paths(content)], {})


class ImageFolder:
    """Images in a folder and below it, each with its caption in a .txt of the same name beside it."""

    kind = "folder"

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}; correct --folder")
        found = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        self.path, self.faults = path, list[str]()
        self.files = sorted(str(file.relative_to(path)) for file in found)
        sizes = (f"{file} {(path / file).stat().st_size}\n" for file in self.files)
        self.fingerprint = hashlib.sha256("".join(sizes).encode(errors="surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def where(self, number: int) -> str:
        """Place of a sample, for messages."""
        return str(self.path / self.files[number])

    def read(self, number: int) -> InputSample:
        """The sample; UserError if it is none."""
        image = self.path / self.files[number]
        text = image.with_suffix(".txt")
        try:
            caption = text.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"its caption {text.name} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"its caption {text.name} is not UTF-8") from error
        identity = str(Path(self.files[number]).with_suffix(""))
        return InputSample({"id": identity, "caption": caption}, [_read_image(image)], {})


class WebDatasetShards:
    """Samples of WebDataset tars: a .json in one of our forms or a .txt caption, and images (or our tiles)."""

    kind = "webdataset"

    def __init__(self, path: Path) -> None:
        pattern = path if path.suffix == ".tar" or "*" in path.name else path / "*.tar"
        self.path, self.faults = path, list[str]()
        self.tars = sorted(pattern.parent.glob(pattern.name))
        if not self.tars:
            raise UserError(f"there is no shard {pattern}; correct --webdataset")
        found = [(tar, start, size) for tar, file in enumerate(self.tars) for start, size in self._scan(file)]
        self.samples = np.array(found, dtype=np.int64).reshape(-1, 3)
        sizes = (f"{tar.name} {tar.stat().st_size}\n" for tar in self.tars)
        self.fingerprint = hashlib.sha256("".join(sizes).encode()).hexdigest()

    def _scan(self, tar: Path) -> list[tuple[int, int]]:
        """Start and size of each sample; what cannot be read behind a fault is left out and said."""
        spans: list[tuple[int, int]] = []
        previous = None
        try:
            with tarfile.open(tar, "r:") as members:
                for member in members:
                    if not member.isfile():
                        continue
                    key, end = split_name(member.name)[0], member.offset_data + -(-member.size // 512) * 512
                    start = spans.pop()[0] if key == previous else member.offset
                    spans.append((start, end - start))
                    previous = key
                check_tar_end(tar, members.offset)
        except (OSError, tarfile.TarError, EOFError) as error:
            self.faults.append(f"{tar} is broken or cut off behind {len(spans)} samples ({error})")
            size = tar.stat().st_size
            spans = [span for span in spans if sum(span) <= size]
        return spans

    def __len__(self) -> int:
        return len(self.samples)

    def where(self, number: int) -> str:
        """Place of a sample, for messages."""
        tar, start, _ = self.samples[number].tolist()
        return f"{self.tars[tar]} at byte {start}"

    def read(self, number: int) -> InputSample:
        """The sample; UserError if it is none."""
        tar, start, size = self.samples[number].tolist()
        with self.tars[tar].open("rb") as file:
            data = os.pread(file.fileno(), size, start)
        key, members = read_members(data)
        content: Mapping[str, Any] = {"id": key}
        if "json" in members:
            content = {"id": key, **_parse_json(members["json"])}
        elif "txt" in members:
            content = {"id": key, "caption": members["txt"].decode(errors="replace")}
        pictures = {name: data for name, data in members.items() if f".{name}".lower().endswith(IMAGE_SUFFIXES)}
        tiles = {name: data for name, data in pictures.items() if is_tile(name)}
        whole = sorted(pictures.keys() - tiles.keys(), key=_natural)
        if tiles and whole:
            raise UserError("it holds both tiles and whole images")
        return InputSample(content, [pictures[name] for name in whole], tiles)


def split_name(name: str) -> tuple[str, str]:
    """A member's name -> key and the rest, at the first dot of its last part, as WebDataset does."""
    folder, slash, base = name.rpartition("/")
    key, _, rest = base.partition(".")
    return folder + slash + key, rest


def is_tile(name: str) -> bool:
    """Whether a picture's name (`0.tile_1.jpg`) is that of a tile cut in advance."""
    return re.fullmatch(r"\d+\.(tile_\d+|thumbnail)\.jpg", name) is not None


def read_members(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and members of one sample's bytes; UserError if they are none."""
    members: dict[str, bytes] = {}
    key = ""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is None:
                    continue
                key, rest = split_name(member.name)
                if rest in members:
                    raise UserError(f"its member {member.name} stands there twice")
                members[rest] = content.read()
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"its bytes are no tar members ({error})") from error
    return key, members


def _natural(name: str) -> list[Any]:
    """Sort key by which 2.jpg comes before 10.jpg."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"its JSON is broken ({error})") from error
    if not isinstance(content, dict):
        raise UserError("its JSON is no object")
    return content


def _read_image(path: Path) -> bytes:
    try:
        if path.stat().st_size > MOST_FILE_BYTES:
            raise UserError(f"its image {path} has over {MOST_FILE_BYTES} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"its image {path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
