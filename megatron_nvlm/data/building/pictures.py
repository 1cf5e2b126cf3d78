"""How an input sample names its pictures, and what a picture is: by its name, or by the first bytes of its file."""

import base64
import binascii
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_nvlm.data.building.text import MOST_SHOWN, shown
from megatron_nvlm.errors import UserError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".jp2", ".jxl", ".mpo", ".ppm", ".pgm", ".tga"),
)
"""Of files that are pictures. What cannot be decoded of them is a reject, and never passed over."""
IMAGE_FIELDS = ("image", "images")
"""Fields of a sample, or of a user's turn, that name pictures."""
FILE_NAME_FIELDS = ("file_name",)
"""Fields that do if what they name ends as a picture does; texts have them too (metadata.jsonl of Hugging Face)."""
_SIGNATURES = (
    re.compile(rb"\xff\xd8\xff"),  # JPEG
    re.compile(rb"\x89PNG\r\n\x1a\n"),
    re.compile(rb"GIF8[79]a"),
    re.compile(rb"RIFF....WEBP", re.DOTALL),
    re.compile(rb"BM....\0\0\0\0", re.DOTALL),
    re.compile(rb"II[*+]\0|MM\0[*+]"),  # TIFF
    re.compile(rb"....ftyp(avif|avis|heic|heix|heif|mif1|msf1)", re.DOTALL),
    re.compile(rb"\0\0\0\x0c(jP  |JXL )\r\n\x87\n"),  # JPEG 2000, JPEG XL
)
_ENCODED_SIGNATURES = ("data:image/", "/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
"""How a data URL begins, and the base64 of JPEG, PNG, GIF and WebP."""
_IMAGE_TAG = re.compile(r"<img\s*>\s*([^<>]+?)\s*</img\s*>", re.IGNORECASE)
"""Qwen-VL's way to name a picture within a text. HTML's `<img src=...>` is text."""
_UNCLOSED_TAG = re.compile(rf"<img\s*>\s*([^<>\n]+?(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))}))\b", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_TEXT_KEYS = frozenset(
    ("value", "content", "text", "from", "role", "type", "id", "answer", "user", "assistant", "source")
)
"""Of what stands within a field that is read: turns, parts of messages, answers."""


def has_image_name(name: str) -> bool:
    """Whether a file of this name, or after this address, is a picture."""
    return re.split(r"[?#]", name, maxsplit=1)[0].strip().lower().endswith(IMAGE_SUFFIXES)


def is_picture(name: str, data: bytes) -> bool:
    """Whether a file is a picture, by its name or its first bytes."""
    return f".{name}".lower().endswith(IMAGE_SUFFIXES) or any(one.match(data) for one in _SIGNATURES)


def present(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null: tables write every column into every line."""
    return {name: value for name, value in content.items() if value is not None}


def take_image_tags(text: str, by: str) -> tuple[str, list[Any]]:
    """The text with `by` where it names a picture in `<img>`, and the names.

    Raises:
        UserError: a tag before a picture's name is not closed.
    """
    named: list[Any] = _IMAGE_TAG.findall(text)
    left = _IMAGE_TAG.sub(lambda found: by, text)
    unclosed = _UNCLOSED_TAG.search(left)
    if unclosed:
        raise UserError(f"its {shown(unclosed[1])} stands behind <img> without </img>; close it")
    return left, named


def tagged_picture(text: str) -> str | None:
    """The picture that a text names in `<img>`; None if there is none."""
    found = _IMAGE_TAG.search(text) or _UNCLOSED_TAG.search(text)
    return found[1] if found else None


# ---- fields


def listed_pictures(fields: Mapping[str, Any]) -> list[Any]:
    """What the fields of a sample or a turn say of its pictures, in order; none for text.

    Raises:
        UserError: two fields name different pictures.
    """
    listed: dict[str, list[Any]] = {}
    for name in IMAGE_FIELDS:
        value = fields.get(name)
        if value not in (None, "", []):
            listed[name] = value if isinstance(value, list) else [value]
    for name in FILE_NAME_FIELDS:
        value = fields.get(name)
        entries = value if isinstance(value, list) else [value]
        if entries and all(isinstance(one, str) and has_image_name(one) for one in entries):
            listed[name] = entries
    naming = {name: [_same(one) for one in entries] for name, entries in listed.items() if all(map(_is_named, entries))}
    for name, paths in naming.items():
        first = next(iter(naming))
        if paths != naming[first]:
            told = " and ".join(f"its {one!r} names {_listing(naming[one])}" for one in (first, name))
            raise UserError(f"{told}; leave one of them out")
    return next(iter(listed.values()), [])


def join_pictures(told: list[Any], listed: list[Any], turns: str) -> list[Any]:
    """The pictures that turns and fields name together.

    Args:
        told: by the turns.
        listed: by the fields.
        turns: what told, for the sentence.

    Raises:
        UserError: they differ.
    """
    if told and listed and [_same(one) for one in told] != [_same(one) for one in listed]:
        raise UserError(
            f"{turns} other pictures ({_listing(told)}) than its 'image' or 'images' ({_listing(listed)}); name each once"
        )
    return told or listed


def picture_source(one: Any) -> str | bytes:
    """What a sample names, as the path of a file or as its content.

    `file://` before a path is taken off, and the rest is the path as it stands (as Qwen's tools read it).

    Raises:
        UserError: it is neither.
    """
    data = embedded_picture(one)
    return picture_path(one) if data is None else data


def picture_path(one: Any) -> str:
    """The path of the file that a sample names; of a picture that stands in the sample (`is_embedded`) there is none.

    Raises:
        UserError: it is no path.
    """
    path = reference(one)
    if not isinstance(path, str) or not path:
        raise UserError("its 'image' is neither a path nor a list of paths")
    path = path.removeprefix("file://")
    if _ADDRESS.match(path):
        raise UserError(f"its image {shown(path)} is an address; download it and name the file, for none is fetched")
    return path


def is_embedded(one: Any) -> bool:
    """Whether the picture stands in the sample itself."""
    path = reference(one)
    return (isinstance(one, Mapping) and one.get("bytes") is not None) or (
        isinstance(path, str) and path.startswith("data:")
    )


def embedded_picture(one: Any) -> bytes | None:
    """The picture that stands in the sample itself; None if it names a file.

    It is a data URL, or the `bytes` beside a `path` as in images of Hugging Face datasets, in JSON as base64.

    Raises:
        UserError: it is no base64.
    """
    if not is_embedded(one):
        return None
    held = one.get("bytes") if isinstance(one, Mapping) else None
    if held is not None:
        return bytes(held) if isinstance(held, bytes | bytearray) else _decode(held, "'bytes'")
    path = reference(one)
    head, _, data = path.partition(",")
    if not head.lower().endswith(";base64"):
        raise UserError(f"its image {shown(path)} is no data URL of base64; write data:image/png;base64,... or a path")
    return _decode(data, "data URL")


def _decode(text: Any, what: str) -> bytes:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (AttributeError, ValueError, binascii.Error) as error:
        raise UserError(f"its image's {what} {shown(str(text))} is no base64 ({error}); correct it") from error
    if not data:
        raise UserError(f"its image's {what} is empty; correct it")
    return data


def picture_place(folder: Path, name: str) -> str:
    """A picture's path for a sentence; of a long name, which may be its base64, the beginning and the length."""
    return (
        str(folder / name)
        if len(name) <= MOST_SHOWN
        else f"{shown(name)}, which is no path; write base64 as data:image/png;base64,..."
    )


def reference(one: Any) -> Any:
    """What names a picture's file, of any writer; None if nothing does."""
    return next((one[key] for key in ("path", "url") if one.get(key)), None) if isinstance(one, Mapping) else one


def _is_named(one: Any) -> bool:
    """Whether an entry names a picture; those of our own sets describe one."""
    return bool(reference(one)) or (isinstance(one, Mapping) and one.get("bytes") is not None)


def _same(one: Any) -> Any:
    """What is equal for equal pictures."""
    if isinstance(one, Mapping) and one.get("bytes") is not None:
        return one["bytes"]
    path = reference(one)
    return posixpath.normpath(path.removeprefix("file://")) if isinstance(path, str) and path else one


def _listing(named: list[Any]) -> str:
    told = [shown(path) if isinstance(path := reference(one), str) else shown(str(one)) for one in named[:3]]
    return ", ".join([*told, *(["..."] if len(named) > 3 else [])])


# ---- what is not read


def refuse_unread_picture(content: Mapping[str, Any], text_fields: frozenset[str]) -> None:
    """Refuse a sample without pictures that names one anywhere: it must not become text alone.

    Args:
        text_fields: those of its texts and turns. What they say may end as a picture's name does.

    Raises:
        UserError: naming the field.
    """
    for field, value in content.items():
        for place, name in _names_within(value, field, field in text_fields, field in text_fields):
            raise UserError(
                f"its {place!r} names the picture {shown(name)}, and pictures are read from "
                f"{', '.join(map(repr, (*IMAGE_FIELDS, *FILE_NAME_FIELDS)))} of a line or of a user's turn; rename the "
                "field, move it there or leave it out"
            )


def _names_within(value: Any, place: str, is_read: bool, is_text: bool) -> Iterator[tuple[str, str]]:
    """(field, name) of pictures that a value names, however deep."""
    if isinstance(value, str):
        is_named_so = bool(value) and "." in place and place.rpartition(".")[2] in IMAGE_FIELDS
        name = tagged_picture(value) if is_text else value if is_named_so or _names_picture(value) else None
        if name is not None:
            yield place, name
    elif isinstance(value, list):
        for one in value:
            yield from _names_within(one, place, is_read, is_text)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if _names_picture(str(key)):
                yield place, str(key)
            yield from _names_within(one, f"{place}.{key}", is_read, is_read and key in _TEXT_KEYS)


def _names_picture(text: str) -> bool:
    return has_image_name(text) or text.startswith(_ENCODED_SIGNATURES)
