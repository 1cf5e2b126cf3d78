"""WebDataset tars as input: members of one key are one sample, wherever they stand in their tar."""

import hashlib
import io
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_nvlm.data.building.energon import read_field_map, tars_for_training
from megatron_nvlm.data.building.forms import has_form, image_names
from megatron_nvlm.data.building.inputs import InputSample
from megatron_nvlm.data.building.members import choose_members
from megatron_nvlm.data.building.names import OUR_NAMES, Names
from megatron_nvlm.data.building.pictures import embedded_picture, is_picture
from megatron_nvlm.data.building.tars import find_tars
from megatron_nvlm.data.building.text import check_name, decode_text, load_json
from megatron_nvlm.data.building.unpacked import OpenFile
from megatron_nvlm.data.shards.write import check_tar_end
from megatron_nvlm.errors import UserError


class WebDatasetShards:
    """Samples of WebDataset tars: a .json in one of our forms or a .txt caption, and images (or our tiles)."""

    kind = "webdataset"

    def __init__(self, path: Path, names: Names = OUR_NAMES) -> None:
        self.names = names
        self.path, self.faults, self.unread = path, list[str](), dict[str, int]()
        self.elsewhere: dict[str, str] = {}
        self.tars = find_tars(path, self.faults)
        self._field_map = None
        if path.is_dir():
            self._field_map = read_field_map(path)
            self.tars, self.unread = tars_for_training(path, self.tars)
        self.containers = self.tars
        self._files: list[OpenFile | None] = []
        """To read the tars from; None for one that cannot be opened."""
        spans: list[tuple[int, int]] = []
        samples: list[tuple[int, int, int]] = []
        self._links: list[dict[int, tuple[int, int]]] = []
        for number, file in enumerate(self.tars):
            scan = self._scan(file)
            self._links.append(scan.links)
            for own in scan.samples:
                samples.append((number, len(spans), len(own)))
                spans += [(start, end - start) for start, end in own]
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 2)
        self.samples = np.array(samples, dtype=np.int64).reshape(-1, 3)
        sizes = [f"{tar.name} {tar.stat().st_size}\n" for tar in self.tars]
        if self._field_map is not None:
            sizes.append(self._field_map.describe())
        self.fingerprint = hashlib.sha256("".join(sizes).encode(errors="surrogateescape")).hexdigest()

    def _scan(self, tar: Path) -> "_Scan":
        """The samples of a tar; what cannot be read after a fault is left out and said."""
        scan = _Scan()
        try:
            file = OpenFile(tar)
        except (UserError, OSError) as error:
            self.faults.append(str(error))
            self._files.append(None)
            return scan
        self._files.append(file)
        try:
            with tarfile.open(file.path, "r:") as members:
                for member in members:
                    scan.add(member)
                check_tar_end(file.path, members.offset)
        except (OSError, tarfile.TarError, EOFError) as error:
            self.faults.append(f"{tar} is broken or cut off after {len(scan.samples)} samples ({error})")
            size = file.path.stat().st_size
            scan.samples = [spans for spans in scan.samples if all(end <= size for _, end in spans)]
        return scan

    def __len__(self) -> int:
        return len(self.samples)

    def where(self, number: int) -> str:
        """Place of a sample, for messages."""
        tar, first, _ = self.samples[number].tolist()
        return f"{self.tars[tar]} at byte {self._spans[first, 0]}"

    def read(self, number: int) -> InputSample:
        """The sample; UserError if it is none."""
        key, members = self._read_members(number)
        check_name(key)
        if self._field_map is not None:
            fields, shown, used = self._field_map.apply(members)
            return InputSample({"id": key, **fields}, shown, {}, tuple(name for name in members if name not in used))
        content: Mapping[str, Any] = {"id": key}
        used = {"json"}
        if "json" in members:
            content = {"id": key, **self.names.apply(_read_json(members["json"]))}
        if "txt" in members and not has_form(content):
            content = {**content, "caption": decode_text(members["txt"], "its caption .txt")}
            used.add("txt")
        pictures = {
            name: data for name, data in members.items() if name not in ("json", "txt") and is_picture(name, data)
        }
        tiles = {name: data for name, data in pictures.items() if is_tile(name)}
        if tiles and tiles.keys() != pictures.keys():
            raise UserError("it holds both tiles and whole images")
        named = [] if tiles else image_names(content)
        held = [embedded_picture(one) for one in named]  # in the json itself
        told = [one for one, data in zip(named, held, strict=True) if data is None]
        chosen = [] if tiles or (named and not told) else choose_members(told, list(pictures), key)
        unread = tuple(name for name in members if name not in used.union(tiles, chosen))
        images = [pictures[name] for name in chosen]
        if told != named:
            found = iter(images)
            images = [next(found) if data is None else data for data in held]
        return InputSample(content, images, tiles, unread)

    def files_of(self, number: int) -> list[Path]:
        """Files that a sample is read from, there or not."""
        return [self.tars[int(self.samples[number, 0])]]

    def _read_members(self, number: int) -> tuple[str, dict[str, bytes]]:
        """Key and members of a sample, by the name after the key in small letters."""
        tar, first, count = self.samples[number].tolist()
        key, members = "", dict[str, bytes]()
        opened = self._files[tar]
        assert opened is not None, "no sample was found in a tar that cannot be opened"
        with opened.path.open("rb") as file:
            for start, size in self._spans[first : first + count].tolist():
                for member, content in _members_of(os.pread(file.fileno(), size, start)):
                    if content is None:
                        content = self._read_link(file, tar, start + member.offset, member)
                    key, rest = split_name(member.name)
                    if rest.lower() in members:
                        raise UserError(f"its member {member.name} stands there twice")
                    members[rest.lower()] = content
        return key, members

    def _read_link(self, file: BinaryIO, tar: int, header: int, member: tarfile.TarInfo) -> bytes:
        if header not in self._links[tar]:
            raise UserError(
                f"its {member.name} is a link to {member.linkname}, which the tar does not hold before it; pack the file"
            )
        start, size = self._links[tar][header]
        return os.pread(file.fileno(), size, start)


class _Scan:
    """Members of one tar, gathered to samples by their keys."""

    def __init__(self) -> None:
        self.samples: list[list[tuple[int, int]]] = []
        """Of each sample the ranges [start, end) of bytes that hold its members, in the order of their first ones."""
        self.links: dict[int, tuple[int, int]] = {}
        """Header of a link -> start and size of the content that it stands for."""
        self._files: dict[str, tuple[int, int]] = {}
        self._of_key: dict[str, int] = {}
        self._rests: dict[str, set[str]] = {}
        self._previous: str | None = None

    def add(self, member: tarfile.TarInfo) -> None:
        """A member; folders, devices and hidden files are passed over."""
        if not _is_read(member):
            return
        self._find_content(member)
        key, rest = split_name(member.name)
        end = member.offset_data + (-(-member.size // 512) * 512 if member.isreg() else 0)
        if key == self._previous:
            spans = self.samples[self._of_key[key]]
            spans[-1] = spans[-1][0], end
        elif key in self._of_key and rest not in self._rests[key]:
            self.samples[self._of_key[key]].append((member.offset, end))
        else:  # a new one, or another of the same key: two tars put together
            self._of_key[key], self._rests[key] = len(self.samples), set()
            self.samples.append([(member.offset, end)])
        self._rests[key].add(rest)
        self._previous = key

    def _find_content(self, member: tarfile.TarInfo) -> None:
        name = posixpath.normpath(member.name)
        if member.isreg():
            self._files[name] = member.offset_data, member.size
            return
        target = member.linkname
        if member.issym():
            target = posixpath.join(posixpath.dirname(name), target)
        found = self._files.get(posixpath.normpath(target))
        if found is not None:
            self._files[name] = self.links[member.offset] = found


def _read_json(data: bytes) -> Mapping[str, Any]:
    """A sample's json; a list alone is its turns, as in tars of Megatron-LM's multimodal example."""
    content = load_json(data)
    if not isinstance(content, list | dict):
        raise UserError("its JSON is neither an object nor a list of turns")
    return content if isinstance(content, dict) else {"conversations": content}


def _is_read(member: tarfile.TarInfo) -> bool:
    hidden = posixpath.basename(member.name).startswith(".")  # macOS' ._0.jpg, .DS_Store
    return not hidden and (member.isreg() or member.islnk() or member.issym())


def split_name(name: str) -> tuple[str, str]:
    """A member's name -> key and the rest, at the first dot of its last part, as WebDataset does."""
    folder, slash, base = name.rpartition("/")
    key, _, rest = base.partition(".")
    return folder + slash + key, rest


def is_tile(name: str) -> bool:
    """Whether a picture's name (`0.tile_1.jpg`) is that of a tile cut in advance."""
    return re.fullmatch(r"\d+\.(tile_\d+|thumbnail)\.jpg", name) is not None


def _members_of(data: bytes) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Members that stand in these bytes, with their content; None for links. UserError if the bytes are none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if _is_read(member):
                    file = tar.extractfile(member) if member.isreg() else None
                    yield member, file.read() if file is not None else None
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"its bytes are no tar members ({error})") from error
