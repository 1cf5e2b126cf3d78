"""How an input sample names its pictures, and what a picture is: by its name, or by the first bytes of its file."""

import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_nvlm.errors import UserError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".jp2", ".jxl", ".mpo", ".ppm", ".pgm", ".tga"),
)
"""Of files that are pictures. What cannot be decoded of them is a reject, and never passed over."""
IMAGE_FIELDS = ("image", "images")
"""Fields that name pictures."""
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
_IMAGE_TAG = re.compile(r"<img>[ \t]*([^<>\n]+?)[ \t]*</img>")
"""Qwen-VL's way to name a picture within a text."""
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")


def has_image_name(name: str) -> bool:
    """Whether a file of this name, or after this address, is a picture."""
    return name.partition("?")[0].lower().endswith(IMAGE_SUFFIXES)


def is_picture(name: str, data: bytes) -> bool:
    """Whether a file is a picture, by its name or its first bytes."""
    return f".{name}".lower().endswith(IMAGE_SUFFIXES) or any(one.match(data) for one in _SIGNATURES)


def present(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null: tables write every column into every line."""
    return {name: value for name, value in content.items() if value is not None}


def replace_image_tags(text: str, by: str) -> str:
    """The text with `by` where it names a picture."""
    return _IMAGE_TAG.sub(lambda found: by, text)


def named_pictures(content: Mapping[str, Any], turns: list[Any]) -> list[Any]:
    """What a sample says of its pictures, in order; none for text.

    Args:
        turns: as they stand in the sample; those of a user may name pictures.

    Raises:
        UserError: the turns name others than the fields.
    """
    content = present(content)
    listed: Any = next((content[name] for name in IMAGE_FIELDS if content.get(name) not in (None, "", [])), [])
    listed = listed if isinstance(listed, list) else [listed]
    told = [name for turn in turns for name in _in_turn(turn)]
    if told and listed and told != [_path_of(one) for one in listed]:
        raise UserError("its turns name other pictures than its 'image' or 'images'; name each once")
    if told or listed:
        return told or listed
    names = (content[field] for field in FILE_NAME_FIELDS if isinstance(content.get(field), str))
    return [name for name in names if has_image_name(name)][:1]


def picture_paths(named: list[Any]) -> list[str]:
    """Paths of the files that `named_pictures` found.

    Raises:
        UserError: it is something else than paths.
    """
    return [_local(_path_of(one)) for one in named]


def refuse_unread_picture(content: Mapping[str, Any], read: frozenset[str]) -> None:
    """Refuse a sample that names a picture where none is looked for: it must not become text alone.

    Args:
        read: fields that are something else.

    Raises:
        UserError: naming the field.
    """
    for field, value in content.items():
        for one in value if isinstance(value, list) else [value]:
            path = _reference(one)
            if field not in read and isinstance(path, str) and has_image_name(path):
                raise UserError(
                    f"its {field!r} names the picture {path[:80]!r}, and pictures are read from "
                    f"{', '.join(map(repr, (*IMAGE_FIELDS, *FILE_NAME_FIELDS)))}; rename the field"
                )


def _in_turn(turn: Any) -> Iterator[str]:
    fields = present(turn) if isinstance(turn, Mapping) else {}
    said = fields.get("value", fields.get("content"))
    if isinstance(said, str):
        found = _IMAGE_TAG.findall(said)
        if found and fields.get("from", fields.get("role")) not in ("human", "user"):
            raise UserError(f"its turns name the picture {found[0][:80]!r} outside a user's turn; move it there")
        yield from found
    for part in said if isinstance(said, list) else ():
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            named = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key)), None)
            if named is not None:
                yield _path_of(named)


def _reference(one: Any) -> Any:
    """What names a picture's file, of any writer."""
    return next((one[key] for key in ("path", "url") if one.get(key)), None) if isinstance(one, Mapping) else one


def _path_of(one: Any) -> str:
    path = _reference(one)
    if not isinstance(path, str) or not path:
        raise UserError("its 'image' is neither a path nor a list of paths")
    return path


def _local(path: str) -> str:
    path = path.removeprefix("file://")
    if path.startswith("data:"):
        raise UserError("its image stands in its text (data:...); write it into a file and name that")
    if _ADDRESS.match(path):
        raise UserError(f"its image {path[:80]!r} is an address; download it and name the file")
    return path


# ---- members of a tar

_AUXILIARY = frozenset(("alpha", "annotation", "depth", "edge", "edges", "mask", "normal", "seg", "segmentation"))
"""Parts of names (`0.seg.png`) of pictures that belong to another one."""


def choose_members(named: list[Any], held: list[str], key: str) -> list[str]:
    """The members that are a sample's pictures, in order.

    Its JSON decides: the members that it names. Names of other files than those in the tar (the pictures' first places) only
    say the number. Without names, the pictures are those whose name is a suffix alone (`0.jpg`) or a number (`0.1.jpg`), or,
    if there are none, all but masks and the like; 2 stands before 10.

    Args:
        named: of `named_pictures`.
        held: names after the key.

    Raises:
        UserError: the JSON names others than there are.
    """
    paths = [_reference(one) for one in named]
    known = {name: name for name in held}
    known.update({posixpath.basename(f"{key}.{name}").lower(): name for name in held})
    found = [known.get(posixpath.basename(path).lower()) if isinstance(path, str) else None for path in paths]
    chosen = [name for name in found if name is not None]
    if named and len(chosen) == len(named):
        return chosen
    main = _main_members(held)
    if not named or (not chosen and len(main) == len(named)):
        if main or not held:
            return main
        raise UserError(f"its pictures are only {', '.join(held)}; name them in the 'images' of its json")
    told = ", ".join(str(path)[:80] for path in paths)
    raise UserError(f"its json names {len(named)} pictures ({told}) and it holds {', '.join(held) or 'none'}")


def _main_members(held: list[str]) -> list[str]:
    stems = {name: name.rpartition(".")[0] for name in held}
    main = [name for name in held if _AUXILIARY.isdisjoint(name.split("."))]
    if any(not stems[name] for name in main):
        main = [name for name in main if not stems[name] or stems[name][-1].isdigit()]
    return sorted(main, key=_natural)


def _natural(name: str) -> list[Any]:
    """Sort key by which 2.jpg comes before 10.jpg."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
