"""What shards are built from, each a numbered list of samples: JSON lines, a JSON array, a folder (tars: webdataset.py).

Opening an input looks at all of it once, so that any sample is reached by its number from any process.
"""

import hashlib
import json
import os
import re
import stat
from abc import ABC, abstractmethod
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_nvlm.data.building.forms import image_files, image_sources
from megatron_nvlm.data.building.names import OUR_NAMES, Names
from megatron_nvlm.data.building.pictures import has_image_name, picture_place
from megatron_nvlm.data.building.text import check_name, decode_text, parse_json, printable
from megatron_nvlm.data.building.unpacked import OpenFile
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import MAX_PIXELS
from megatron_nvlm.regular_files import check_regular, read_whole

_MOST_SPACE = 4096
"""Bytes by which a file that is an array has begun."""
_BETWEEN = re.compile(r"[ \t\r\n,]*")
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
    unread_members: tuple[str, ...] = ()
    """Names of what stood beside them and is not read."""


class Input(Protocol):
    """A numbered list of samples."""

    path: Path
    kind: str
    faults: list[str]
    """What could not even be numbered: sentences."""
    unread: dict[str, int]
    """What lies there and is no sample nor part of one, by kind, and how many."""
    elsewhere: dict[str, str]
    """Folders beside `path` that samples are read from."""
    containers: list[Path]
    """Files of many samples, in which opening has found where each one lies."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Hash that changes if the list does."""

    def where(self, number: int) -> str:
        """Place of a sample, for messages."""

    def read(self, number: int) -> InputSample:
        """The sample; UserError if it is none."""

    def files_of(self, number: int) -> Sequence[Path]:
        """Files that a sample is read from, there or not; without those whose content the fingerprint holds."""


class FieldSamples(ABC):
    """Samples that are fields in one of the forms, with pictures in files below `images` or in the fields."""

    images: Path
    names: Names
    _last: tuple[int, dict[str, Any]] | None = None
    """The content that was asked for last: a build asks for a sample's files and then for the sample."""

    @abstractmethod
    def _fields(self, number: int) -> Mapping[str, Any]:
        """A sample as it stands there; UserError if it is none."""

    def _content(self, number: int) -> dict[str, Any]:
        if self._last is None or self._last[0] != number:
            self._last = number, self.names.apply(self._fields(number))
        return self._last[1]

    def read(self, number: int) -> InputSample:
        """The sample; UserError if it is none."""
        content = self._content(number)
        return InputSample(content, [read_image(self.images, source) for source in image_sources(content)], {})

    def files_of(self, number: int) -> list[Path]:
        """Files that a sample is read from, there or not."""
        try:
            return [self.images / path for path in image_files(self._content(number))]
        except UserError:
            return []


class JsonLines(FieldSamples):
    """A file with one JSON object a line; paths of images are relative to `images`."""

    kind = "jsonl"

    def __init__(self, path: Path, file: OpenFile, images: Path | None = None, names: Names = OUR_NAMES) -> None:
        self._file = file
        self.path, self.images, self.names, self.containers = path, images or path.parent, names, [path]
        self.faults, self.unread = list[str](), dict[str, int]()
        self.elsewhere = {} if self.images == path.parent else {"images": str(self.images)}
        self._number()

    def _number(self) -> None:
        """Find the samples."""
        starts, lines, digest, offset = array("q"), array("q"), hashlib.sha256(), 0
        with self._file.path.open("rb") as file:
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

    def _fields(self, number: int) -> dict[str, Any]:
        return parse_json(self._bytes_of(number))

    def _bytes_of(self, number: int) -> bytes:
        with self._file.path.open("rb") as file:
            file.seek(int(self.starts[number]))
            return file.readline()


class JsonArray(JsonLines):
    """A file with one JSON array of objects, as LLaVA's; read like JSON lines."""

    kind = "json"

    @classmethod
    def is_one(cls, file: OpenFile) -> bool:
        """Whether a file begins as an array does."""
        with file.path.open("rb") as opened:
            return opened.read(_MOST_SPACE).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")

    def _number(self) -> None:
        data = self._file.path.read_bytes()
        self.fingerprint = hashlib.sha256(data).hexdigest()
        text = decode_text(data, str(self.path))
        place = text.index("[") + 1
        at = len(data) - len(text.encode()) + place  # in bytes, the mark before the text included
        decoder, starts, ends = json.JSONDecoder(), array("q"), array("q")
        while (begin := _BETWEEN.match(text, place).end()) < len(text) and text[begin] != "]":  # type: ignore[union-attr]
            at += begin - place
            try:
                _, place = decoder.raw_decode(text, begin)
            except (ValueError, RecursionError) as error:
                self.faults.append(f"its JSON array is broken after {len(starts)} entries ({error})")
                break
            starts.append(at)
            at += len(text[begin:place].encode())
            ends.append(at)
        else:
            if begin >= len(text):
                self.faults.append(f"its JSON array has no end; it is cut off after {len(starts)} entries")
            elif text[begin + 1 :].strip():
                self.faults.append("more stands after the end of its JSON array; give one array, or one object a line")
        self.starts, self.ends = np.array(starts), np.array(ends)
        self.lines = np.arange(1, len(starts) + 1)

    def where(self, number: int) -> str:
        """Place of a sample, for messages."""
        return f"{self.path} entry {self.lines[number]}"

    def _bytes_of(self, number: int) -> bytes:
        with self._file.path.open("rb") as file:
            file.seek(int(self.starts[number]))
            return file.read(int(self.ends[number] - self.starts[number]))


def open_json(path: Path, images: Path | None, names: Names = OUR_NAMES) -> JsonLines:
    """JSON lines, or one JSON array; either may be compressed with gzip or zstd.

    Raises:
        UserError: there is no such file.
    """
    check_regular(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; correct --jsonl")
    file = OpenFile(path)
    return (JsonArray if JsonArray.is_one(file) else JsonLines)(path, file, images, names)


class ImageFolder:
    """Images in a folder and below it, each with its caption in a .txt of the same name beside it.

    Linked folders are followed, each folder once. Names that begin with a dot are passed over: macOS' `._0.jpg`, caches.
    """

    kind = "folder"

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}; correct --folder")
        self.path, self.faults, self.elsewhere, self.containers = path, list[str](), dict[str, str](), list[Path]()
        found = sorted(str(file) for file in files_below(path, self.faults))
        sizes = {file: size for file in found if has_image_name(file) and (size := _size(path / file)) is not None}
        self.names = list(sizes)
        captions = {str(Path(file).with_suffix(".txt")) for file in self.names}
        left = Counter(map(_name_of_unread, set(found) - set(self.names) - captions))
        self.unread = dict(sorted(left.items()))
        listed = "".join(f"{file} {size}\n" for file, size in sizes.items())
        self.fingerprint = hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def where(self, number: int) -> str:
        """Place of a sample, for messages."""
        return str(self.path / self.names[number])

    def read(self, number: int) -> InputSample:
        """The sample; UserError if it is none."""
        image = self.path / self.names[number]
        check_name(self.names[number])
        text = image.with_suffix(".txt")
        what = f"its caption {text.name}"
        caption = decode_text(read_whole(text, what, MOST_FILE_BYTES), what)
        identity = str(Path(self.names[number]).with_suffix(""))
        return InputSample({"id": identity, "caption": caption}, [read_image(self.path, self.names[number])], {})

    def files_of(self, number: int) -> list[Path]:
        """Files that a sample is read from, there or not."""
        image = self.path / self.names[number]
        return [image, image.with_suffix(".txt")]


def read_image(folder: Path, name: str | bytes) -> bytes:
    """An image by its path, or its content as it stands."""
    if isinstance(name, bytes):
        return name
    return read_whole(folder / name, f"its image {printable(picture_place(folder, name))}", MOST_FILE_BYTES)


def files_below(root: Path, faults: list[str]) -> Iterator[Path]:
    """Files below a folder, relative to it, without hidden ones.

    Linked folders are followed after all others. What was seen already is not read again, and a link to a folder that it
    lies in leads nowhere, so no link makes a loop.

    Args:
        faults: gets a sentence for each folder that cannot be read.
    """

    def fault(error: OSError) -> None:
        faults.append(f"the folder {error.filename} cannot be read ({error.strerror}); correct its permissions")

    seen: set[str] = set()
    waiting = deque([root])
    while waiting:
        for folder, names, files in os.walk(waiting.popleft(), onerror=fault):
            place = os.path.realpath(folder)
            if place in seen:
                names.clear()
                continue
            seen.add(place)
            yield from (Path(folder, file).relative_to(root) for file in files if not file.startswith("."))
            names[:] = sorted(name for name in names if not name.startswith("."))
            linked = (Path(folder, name) for name in names if os.path.islink(os.path.join(folder, name)))
            waiting.extend(link for link in linked if not _leads_up(link, place, root))


def _leads_up(link: Path, place: str, root: Path) -> bool:
    """Whether a link in a folder leads to that folder or one around it, or around the root."""
    target = Path(os.path.realpath(link))
    return any(Path(inner).is_relative_to(target) for inner in (place, os.path.realpath(root)))


def _size(path: Path) -> int | None:
    """In bytes; 0 if it cannot be reached (a link to nothing), to be named in a reject; None for what is no regular file."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _name_of_unread(file: str) -> str:
    suffix = Path(file).suffix
    return printable(f"file {suffix or Path(file).name}"[:60]) + (" without a picture" if suffix == ".txt" else "")
