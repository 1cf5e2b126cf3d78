"""One input sample -> the record and pictures that go into a shard."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from megatron_nvlm.data.building.forms import DEFAULT_CAPTION_PROMPT, to_conversation, unread_fields
from megatron_nvlm.data.building.inputs import InputSample
from megatron_nvlm.data.building.mpo import first_picture
from megatron_nvlm.data.building.names import OUR_NAMES, Names
from megatron_nvlm.data.building.text import printable
from megatron_nvlm.data.prepare import stored_grid
from megatron_nvlm.data.shards.records import RawSample
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import decode_image, read_header
from megatron_nvlm.image.tiling import choose_grid, cut_tiles

Stored = tuple[dict[str, Any], dict[str, bytes]]
"""Record and pictures."""
TILE_FIELDS = ("tile_size", "max_tiles", "quality")
"""Settings that say nothing about a set without tiles."""
_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Files of these formats are stored as they are, of an MPO its first JPEG; others become PNG."""
_MOST_NAMED = 8
"""Members that a sentence names."""


@dataclass(frozen=True)
class SampleSettings:
    """How samples are stored."""

    images: str = "tiles"
    """tiles: cut in advance, as JPEG; whole: as they are, tiled when read, so that the run's own limit of tiles holds."""
    tile_size: int = 448
    max_tiles: int = 6
    quality: int = 90
    """Of the tiles' JPEG, with full colour resolution."""
    source: str = "unknown"
    """Name by which training counts bad samples."""
    caption_prompt: str = DEFAULT_CAPTION_PROMPT
    background: str | None = None
    """Colour behind transparent pixels of what is stored as tiles or becomes PNG; None drops transparency."""
    keep: tuple[str, ...] = ()
    """Further fields of the input that go into the record."""
    names: Names = OUR_NAMES
    """What the input calls fields, roles and the place of a picture; its readers apply it."""

    def describe(self) -> dict[str, Any]:
        """For the index and the manifest; whole images fit any size of tiles."""
        facts = asdict(self)
        if self.images == "whole":
            for name in TILE_FIELDS:
                del facts[name]
        if self.background is None:
            del facts["background"]  # sets of before it could be chosen do not name it
        names = self.names.describe()
        del facts["names"]  # sets of before have none
        return {**facts, "keep": list(self.keep), **({"names": names} if names else {})}


def make_sample(sample: InputSample, settings: SampleSettings) -> Stored:
    """Record and pictures of a sample.

    Raises:
        UserError: what is wrong with it, in one sentence.
    """
    num_images = len(sample.images) or len({name.split(".")[0] for name in sample.cut_tiles})
    try:
        conversation = to_conversation(sample.content, num_images, settings.caption_prompt)
    except UserError as error:
        if not sample.unread_members:
            raise
        passed_over = ", ".join(printable(name[:60]) for name in sample.unread_members[:_MOST_NAMED])
        raise UserError(f"{error}; members that are not read: {passed_over}") from error
    record: dict[str, Any] = {
        "conversation": conversation,
        "source": sample.content.get("source") or settings.source,
        **{name: _kept(sample.content, name) for name in ("id", *settings.keep) if name in sample.content},
    }
    if sample.cut_tiles:
        record["images"], pictures = _take_tiles(sample, num_images, settings), dict(sample.cut_tiles)
    else:
        record["images"], pictures = [], {}
        for number, data in enumerate(sample.images):
            try:
                entry, stored = _store_image(data, settings)
            except UserError as error:
                raise UserError(f"its image {number}: {error}") from error
            record["images"].append(entry)
            pictures.update({f"{number}.{name}": picture for name, picture in stored.items()})
    return record, pictures


def _kept(content: Mapping[str, Any], name: str) -> Any:
    """A field that goes into the record."""
    try:
        json.dumps(content[name])
    except TypeError as error:  # the bytes of a table
        raise UserError(f"its {name!r} holds bytes, which --keep cannot keep; leave that out") from error
    return content[name]


def unread_parts(sample: InputSample, settings: SampleSettings) -> list[str]:
    """What of a sample decides nothing and is not kept: for the report, so that a misspelled field is seen."""
    fields = [f"field {name}" for name in unread_fields(sample.content, settings.keep)]
    return [printable(name[:60]) for name in [*fields, *(f"member .{name}" for name in sample.unread_members)]]


def tile_names(num_tiles: int) -> list[str]:
    """Names of an image's tiles, the thumbnail's last."""
    return [*(f"tile_{number}.jpg" for number in range(1, num_tiles + 1) if num_tiles > 1), "thumbnail.jpg"]


def _store_image(data: bytes, settings: SampleSettings) -> tuple[dict[str, Any], dict[str, bytes]]:
    if settings.images == "whole":
        data = first_picture(data)
    # The whole file, so that a cut-off one is found now and not in training
    image = decode_image(data, settings.background)
    entry: dict[str, Any] = {"width": image.width, "height": image.height}
    if settings.images == "whole":
        suffix = _KEPT_FORMATS.get(read_header(data).format)
        return entry, {suffix: data} if suffix else {"png": _encode(image, "PNG")}
    grid = choose_grid(image.width, image.height, settings.max_tiles, settings.tile_size)
    tiles = cut_tiles(image, grid, settings.tile_size)
    encoded = [_encode(tile, "JPEG", quality=settings.quality, subsampling=0) for tile in tiles]
    return {**entry, "grid": list(grid)}, dict(zip(tile_names(grid.num_tiles), encoded, strict=True))


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _take_tiles(sample: InputSample, num_images: int, settings: SampleSettings) -> list[Mapping[str, Any]]:
    """The images' entries of a sample whose tiles were cut before; they are kept byte for byte."""
    if settings.images == "whole":
        raise UserError("its images are cut in tiles already; build it with --images tiles")
    raw = RawSample("", dict(sample.content), dict(sample.cut_tiles))
    entries = sample.content.get("images")
    if not isinstance(entries, list) or len(entries) != num_images:
        raise UserError(f"it has tiles of {num_images} images and its 'images' does not list them")
    for number in range(num_images):
        grid = stored_grid(raw, number)
        for name in tile_names(grid.num_tiles):
            if f"{number}.{name}" not in sample.cut_tiles:
                raise UserError(f"its {number}.{name} is missing")
            size = decode_image(sample.cut_tiles[f"{number}.{name}"]).size
            if size != (settings.tile_size, settings.tile_size):
                raise UserError(f"its {number}.{name} has {size[0]}x{size[1]} pixels and not {settings.tile_size}")
    return entries
