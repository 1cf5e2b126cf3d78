"""What can be wrong with a shard set, found and named: sets with our index, and plain WebDataset tars without one."""

import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_nvlm.data.building.forms import unread_fields
from megatron_nvlm.data.building.pictures import is_picture
from megatron_nvlm.data.building.samples import tile_names
from megatron_nvlm.data.building.text import check_name, decode_text, load_json
from megatron_nvlm.data.building.webdataset import split_name
from megatron_nvlm.data.order.lengths import TextTokenCounter
from megatron_nvlm.data.prepare import number_of_images, stored_grid
from megatron_nvlm.data.shards.index import INDEX_FILE, UNKNOWN_TOKENS, Index, hash_file, open_index
from megatron_nvlm.data.shards.records import RawSample, check_key, describe_images, is_whole, parse_sample
from megatron_nvlm.data.shards.write import check_tar_end
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import decode_image, read_header
from megatron_nvlm.text.conversation import IMAGE_PLACEHOLDER, check_turns, read_turns


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    place: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}: {self.message}"


@dataclass
class Findings:
    """Of a set or of one shard."""

    faults: list[Fault] = field(default_factory=list)
    num_samples: int = 0
    num_images: int = 0
    keys: dict[str, str] = field(default_factory=dict)
    """Key -> the shard that holds it."""
    unread: Counter[str] = field(default_factory=Counter)
    """Fields and members that are not read, and in how many samples. No faults: others may need them."""

    def add(self, other: "Findings") -> None:
        """Take in what another found, and compare the keys of both."""
        for key in other.keys.keys() & self.keys.keys():
            first, second = Path(self.keys[key]).name, other.keys[key]
            self.faults.append(Fault(second, "duplicate key", f"the sample {key} stands in {first} too"))
        self.keys.update(other.keys)
        self.faults += other.faults
        self.num_samples += other.num_samples
        self.num_images += other.num_images
        self.unread.update(other.unread)


@dataclass(frozen=True)
class Check:
    """How to look. Pickled into processes."""

    decode: bool = True
    """Decode every image; otherwise its header alone is read."""
    count_text: TextTokenCounter | None = None
    """Compare the index's counts with this tokenizer's."""


def lint(folder: Path, check: Check, num_processes: int = 1) -> Findings:
    """All faults of the set in a folder (or of one tar)."""
    findings = Findings()
    if folder.is_file():
        findings.add(lint_plain_shard(folder, check))
        return findings
    tars = sorted(folder.glob("*.tar"))
    for left in sorted([*folder.glob("*.partial"), *folder.glob("parts")]):
        findings.faults.append(
            Fault(str(left), "unfinished", "a build was interrupted; repeat its command or delete this")
        )
    if (folder / INDEX_FILE).exists():
        jobs = _jobs_with_index(folder, tars, check, findings)
    elif tars:
        jobs = [(lint_plain_shard, (tar, check)) for tar in tars]
    else:
        findings.faults.append(Fault(str(folder), "no shards", "it holds neither an index nor a .tar"))
        return findings
    for found in _run(jobs, num_processes):
        findings.add(found)
    return findings


Job = tuple[Callable[..., Findings], tuple[Any, ...]]


def _run(jobs: list[Job], num_processes: int) -> Iterator[Findings]:
    if num_processes == 1 or len(jobs) < 2:
        yield from (function(*arguments) for function, arguments in jobs)
        return
    with ProcessPoolExecutor(num_processes) as pool:
        for future in [pool.submit(function, *arguments) for function, arguments in jobs]:
            yield future.result()


# ---- sets with our index


def _jobs_with_index(folder: Path, tars: list[Path], check: Check, findings: Findings) -> list[Job]:
    try:
        index = open_index(folder, check_hashes=True)
    except UserError as error:
        findings.faults.append(Fault(str(folder / INDEX_FILE), "index", str(error)))
        return [(lint_plain_shard, (tar, check)) for tar in tars]
    named = {shard["name"] for shard in index.shards}
    for tar in tars:
        if tar.name not in named:
            findings.faults.append(
                Fault(str(tar), "not in index", "no sample of it is ever read; build the index again")
            )
    if check.count_text is not None and index.text != check.count_text.description:
        findings.faults.append(
            Fault(
                str(folder / INDEX_FILE),
                "text counts",
                "its text was counted with another tokenizer or template, or not",
            )
        )
    return [(lint_indexed_shard, (folder, number, check)) for number in range(len(index.shards))]


def lint_indexed_shard(folder: Path, number: int, check: Check) -> Findings:
    """A shard against its rows of the index."""
    index, found = open_index(folder), Findings()
    shard = index.shards[number]
    path = folder / shard["name"]

    def fault(kind: str, message: str, place: str = str(path)) -> None:
        found.faults.append(Fault(place, kind, message))

    if not path.is_file():
        fault("missing", "the index names it and it is not there")
        return found
    size = path.stat().st_size
    if size != shard["size"]:
        fault("size", f"it has {size} bytes and the index says {shard['size']}")
    elif hash_file(path) != shard["sha256"]:
        fault("changed", "its sha256 is not the one of the index")
    start = sum(index.shard_sizes[:number])
    with path.open("rb") as file:
        for row in range(start, start + index.shard_sizes[number]):
            stored = index.samples[row]
            file.seek(int(stored["offset"]))
            data = file.read(int(stored["size"]))
            place = f"{path} sample {row}"
            if zlib.crc32(data) != int(stored["crc32"]):
                fault("changed", "its bytes are not those that were written", place)
            try:
                sample = parse_sample(data)
            except UserError as error:
                fault("unreadable", str(error), place)
                continue
            found.num_samples += 1
            if sample.key in found.keys:
                fault("duplicate key", f"the sample {sample.key} stands twice in it")
            found.keys[sample.key] = str(path)
            place = f"{path} sample {sample.key}"
            for kind, message in _check_sample(sample, index, row, check):
                fault(kind, message, place)
            found.num_images += int(stored["num_images"])
            found.unread.update(f"field {name}" for name in unread_fields(sample.record, ()))
    return found


def _check_sample(sample: RawSample, index: Index, row: int, check: Check) -> Iterator[tuple[str, str]]:
    """Faults of one of our samples, and where it disagrees with the index."""
    try:
        check_key(sample.key)
    except UserError as error:
        yield "key", str(error)
    yield from check_record(sample)
    yield from _check_pictures(sample, index.settings.get("tile_size"), check)
    stored = index.samples[row]
    first = int(stored["first_image"])
    listed = [tuple(image) for image in index.images[first : first + int(stored["num_images"])].tolist()]
    found = [(one.width, one.height, one.cols, one.rows) for one in describe_images(sample.record, sample.pictures)]
    if listed != found:
        yield "index", f"the index says images of (width, height, columns, rows) {listed} and it has {found}"
    if check.count_text is not None:
        try:
            tokens = check.count_text(sample.record)
        except UserError:
            tokens = UNKNOWN_TOKENS  # said above
        if tokens != int(stored["num_text_tokens"]):
            yield "text counts", f"the index says {int(stored['num_text_tokens'])} text tokens and it has {tokens}"


def check_record(sample: RawSample) -> Iterator[tuple[str, str]]:
    """Faults of a record: its conversation, its placeholders, its images' number."""
    try:
        turns = read_turns(sample.record)
        try:
            check_turns(turns)
        except UserError as error:
            yield "conversation", str(error)
        num_images = number_of_images(sample)
        placeholders = sum(turn.num_images for turn in turns)
        if placeholders != num_images:
            yield "placeholders", f"its text has {placeholders} {IMAGE_PLACEHOLDER} and it has {num_images} images"
    except UserError as error:
        yield "record", str(error)


def _check_pictures(sample: RawSample, tile_size: int | None, check: Check) -> Iterator[tuple[str, str]]:
    images = sample.record.get("images")
    for number in range(len(images)) if isinstance(images, list) else ():
        own = [name for name in sample.pictures if name.split(".")[0] == str(number)]
        if any(is_whole(name) for name in own):
            if len(own) > 1:
                yield "pictures", f"its image {number} is stored as {', '.join(own)}; one was expected"
            continue
        try:
            expected = {f"{number}.{name}" for name in tile_names(stored_grid(sample, number).num_tiles)}
        except UserError as error:
            yield "pictures", str(error)
            continue
        for name in sorted(expected - set(own)):
            yield "missing tile", f"its {name} is missing"
        for name in sorted(set(own) - expected):
            yield "pictures", f"its {name} belongs to no tile of its grid"
    for name, data in sample.pictures.items():
        try:
            size = _look_at(data, check.decode)
        except UserError as error:
            yield "image", f"its {name}: {error}"
            continue
        if not is_whole(name) and tile_size is not None and size != (tile_size, tile_size):
            yield "tile size", f"its {name} has {size[0]}x{size[1]} pixels and the set's tile_size is {tile_size}"


def _look_at(data: bytes, decode: bool) -> tuple[int, int]:
    """Size of an image; UserError if it is none."""
    if decode:
        return decode_image(data).size
    header = read_header(data)
    return header.width, header.height


# ---- tars of any WebDataset writer


def lint_plain_shard(path: Path, check: Check) -> Findings:
    """A tar without index: what stops or misleads a WebDataset reader."""
    look = _PlainShard(path, check)
    if path.stat().st_size == 0:
        look.fault("empty", "it has no bytes at all")
        return look.found
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                try:
                    content = tar.extractfile(member)
                except KeyError:  # a link to what is not there
                    look.fault("member", f"{member.name} is a link to {member.linkname}, which the tar does not hold")
                    continue
                if content is not None:
                    look.add(member.name, content.read())
                elif not member.isdir():
                    look.fault("member", f"{member.name} is neither file nor folder")
            look.finish_sample()
            check_tar_end(path, tar.offset)
    except (OSError, tarfile.TarError, EOFError) as error:
        look.fault("unreadable", f"it is broken or cut off after {look.found.num_samples} samples ({error})")
    if not look.found.keys and not look.found.faults:
        look.fault("empty", "it holds no sample")
    return look.found


class _PlainShard:
    """Members of a plain tar, gathered to samples as WebDataset does."""

    def __init__(self, path: Path, check: Check) -> None:
        self.path, self.check, self.found = path, check, Findings()
        self.key: str | None = None
        self.members: dict[str, bytes] = {}

    def fault(self, kind: str, message: str, sample: str = "") -> None:
        self.found.faults.append(Fault(f"{self.path}{sample}", kind, message))

    def add(self, name: str, data: bytes) -> None:
        key, rest = split_name(name)
        if not rest or not key.rpartition("/")[2]:
            self.fault("key", f"the member {name} has no name before a dot or none after; readers skip it")
            return
        try:
            check_name(name)
        except UserError as error:
            self.fault("key", str(error))
        if key != self.key:
            self.finish_sample()
            if key in self.found.keys:
                self.fault("duplicate key", f"the sample {key} stands twice in it, or its members stand apart")
            self.found.keys[key] = str(self.path)
            self.key, self.members = key, {}
        elif rest in self.members:
            self.fault("duplicate member", f"{name} stands there twice")
        self.members[rest] = data

    def finish_sample(self) -> None:
        if self.key is None:
            return
        self.found.num_samples += 1
        self.found.num_images += sum(_is_image(name, data) for name, data in self.members.items())
        self.found.unread.update(_unread(self.members))
        for kind, message in _check_plain_sample(self.members, self.check):
            self.fault(kind, message, f" sample {self.key}")


def _is_text(name: str) -> bool:
    return name.endswith(("json", "txt"))


def _is_image(name: str, data: bytes) -> bool:
    return not _is_text(name) and is_picture(name, data)


def _unread(members: dict[str, bytes]) -> Iterator[str]:
    """What of a sample a build would not read."""
    for name, data in members.items():
        if name.lower() == "json":
            try:
                content = json.loads(data)
            except (ValueError, RecursionError):
                continue  # said elsewhere
            yield from (f"field {field}" for field in (unread_fields(content, ()) if isinstance(content, dict) else ()))
        elif name.lower() != "txt" and not _is_image(name, data):
            yield f"member .{name}"


def _check_plain_sample(members: dict[str, bytes], check: Check) -> Iterator[tuple[str, str]]:
    for name, data in members.items():
        try:
            if _is_image(name, data):
                kind = "image"
                _look_at(data, check.decode)
            elif name.endswith("json"):
                kind = "json"
                load_json(data)
            elif name.endswith("txt"):
                kind = "text"
                decode_text(data, "it")
        except UserError as error:
            yield kind, f"its {name}: {error}"
    if not any(map(_is_text, members)):
        yield "no text", f"it has no .json and no .txt, only {', '.join(members)}"
