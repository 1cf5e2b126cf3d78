"""A stored sample: its bytes in a tar, taken apart, and what its pictures are, without decoding them."""

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import read_header


@dataclass(frozen=True)
class RawSample:
    """A sample as stored: its key, its JSON, and its pictures by the name after the key (`0.tile_1.jpg`)."""

    key: str
    record: dict[str, Any]
    pictures: dict[str, bytes]


@dataclass(frozen=True)
class StoredImage:
    """What the index keeps of an image.

    Width and height are those of the upright image, 0 if unknown; the grid is that of tiles cut in advance, 0x0 for an
    image stored whole.
    """

    width: int
    height: int
    cols: int
    rows: int


def check_key(key: str) -> None:
    """Refuse keys that a WebDataset reader would split or take for a folder."""
    if not key or "." in key or "/" in key:
        raise UserError(f"the sample key {key!r} must hold neither dot nor slash")


def parse_sample(data: bytes) -> RawSample:
    """The members of one sample, from the bytes of a tar without its end.

    Raises:
        UserError: the bytes are no sample, or not exactly one.
    """
    key, record = None, None
    pictures: dict[str, bytes] = {}
    end = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is None:
                    continue
                member_key, _, rest = member.name.partition(".")
                key = key or member_key
                if member_key != key:
                    raise UserError(f"samples {key} and {member_key} run into each other; build the shards again")
                if rest in pictures or (rest == "json" and record is not None):
                    raise UserError(f"the member {member.name} stands there twice; build the shards again")
                end = member.offset_data + member.size
                if end > len(data):
                    raise UserError(f"the member {member.name} is cut off")
                if rest == "json":
                    record = json.load(content)
                else:
                    pictures[rest] = content.read()
    except (tarfile.TarError, ValueError, KeyError, EOFError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"its bytes are no tar members with a JSON ({error})") from error
    if len(data) - end >= 1024:
        raise UserError(f"{len(data) - end} bytes after its last member are no tar members")
    if key is None or not isinstance(record, dict):
        raise UserError(f"the sample {key} has no JSON")
    return RawSample(key, record, pictures)


def is_whole(name: str) -> bool:
    """Whether a picture's name (`0.jpg`) is that of a whole image, not of a tile (`0.tile_1.jpg`)."""
    return name.count(".") == 1


def describe_images(record: Mapping[str, Any], pictures: Mapping[str, bytes]) -> list[StoredImage]:
    """What the index keeps of each image, in order; of a broken one it keeps zeros, for training to count as bad."""
    listed = record.get("images", [])
    listed = listed if isinstance(listed, list) else []
    whole = {name.split(".")[0]: data for name, data in pictures.items() if is_whole(name)}
    described = []
    for number, entry in enumerate(listed):
        entry = entry if isinstance(entry, Mapping) else {}
        if str(number) in whole:
            width, height = _measure(whole[str(number)])
            described.append(StoredImage(width, height, 0, 0))
        else:
            width, height = (_count(entry.get(name)) for name in ("width", "height"))
            grid = entry.get("grid")
            sides = [_count(side, 0xFFFF) for side in grid] if isinstance(grid, list) and len(grid) == 2 else [0, 0]
            described.append(StoredImage(width, height, *(sides if all(sides) else (0, 0))))
    return described


def _count(value: Any, limit: int = 0xFFFFFFFF) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= limit else 0


def _measure(data: bytes) -> tuple[int, int]:
    """Size of an image once upright, from its header; (0, 0) if it has none."""
    try:
        header = read_header(data)
    except UserError:
        return 0, 0
    return header.width, header.height
