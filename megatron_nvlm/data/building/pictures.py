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
_IMAGE_TAG = re.compile(r"<img>\s*([^<>]+?)\s*</img>", re.IGNORECASE)
"""Qwen-VL's way to name a picture within a text."""
_TURN_FIELDS = frozenset(("from", "role", "value", "content", *IMAGE_FIELDS))
"""Fields of a turn in which pictures are looked for, and its speaker's name."""
_LONGEST_PATH = 4096
"""Bytes of a path in Linux."""
_MOST_SHOWN = 40
"""Characters of a name in a sentence: what stands there may be a whole picture in base64."""
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
    listed = _listed(content)
    told = [name for turn in turns for name in _in_turn(turn)]
    if told and listed and told != [_path_of(one) for one in listed]:
        raise UserError("its turns name other pictures than its 'image' or 'images'; name each once")
    if told or listed:
        return told or listed
    return _file_names(content)[:1]


def _listed(fields: Mapping[str, Any]) -> list[Any]:
    """What `image` and `images` of a sample or a turn name.

    Raises:
        UserError: they, or a file name beside them, name different pictures.
    """
    found: list[Any] = []
    for name in IMAGE_FIELDS:
        value = fields.get(name)
        if value in (None, "", []):
            continue
        own = value if isinstance(value, list) else [value]
        if found and list(map(_reference, found)) != list(map(_reference, own)):
            raise UserError("its 'image' and 'images' name different pictures; leave one of them out")
        found = own
    for name in _file_names(fields) if found else ():
        references = [one for one in map(_reference, found) if isinstance(one, str)]
        if references and posixpath.basename(name) not in map(posixpath.basename, references):
            raise UserError(
                f"its file name {shown(name)} is another picture than its 'image' or 'images'; leave one of them out"
            )
    return found


def _file_names(fields: Mapping[str, Any]) -> list[str]:
    names = (fields[field] for field in FILE_NAME_FIELDS if isinstance(fields.get(field), str))
    return [name for name in names if has_image_name(name)]


def own_pictures(turn: Any) -> int:
    """Number of the pictures that a turn names in a field of its own."""
    return len(_listed(present(turn))) if isinstance(turn, Mapping) else 0


def shown(name: str) -> str:
    """A name as a sentence shows it: of a long one the beginning and its length."""
    return repr(name) if len(name) <= 2 * _MOST_SHOWN else f"{name[:_MOST_SHOWN]!r}... ({len(name)} characters)"


def picture_paths(named: list[Any]) -> list[str]:
    """Paths of the files that `named_pictures` found.

    Raises:
        UserError: it is something else than paths.
    """
    return [_local(_path_of(one)) for one in named]


def refuse_unread_picture(content: Mapping[str, Any], turns: list[Any], read: frozenset[str]) -> None:
    """Refuse a sample that names a picture where none is looked for: it must not become text alone.

    Args:
        turns: as they stand in the sample.
        read: fields that are something else.

    Raises:
        UserError: naming the field.
    """
    others = [(field, value) for field, value in content.items() if field not in read]
    for number, turn in enumerate(turns):
        fields = present(turn) if isinstance(turn, Mapping) else {}
        others += [(f"turn {number}: {field}", value) for field, value in fields.items() if field not in _TURN_FIELDS]
    for field, value in others:
        for place, name in _names_below(field, value):
            raise UserError(
                f"its {place!r} names the picture {shown(name)}, and pictures are read from "
                f"{', '.join(map(repr, (*IMAGE_FIELDS, *FILE_NAME_FIELDS)))}; rename the field"
            )
    for field, value in content.items():
        found = _IMAGE_TAG.search(value) if isinstance(value, str) else None
        if found:
            raise UserError(
                f"its {field!r} names the picture {shown(found[1])}, which only a user's turn can; move it there"
            )


def _names_below(place: str, value: Any) -> Iterator[tuple[str, str]]:
    """(field, name) of each picture that a value names, at any depth."""
    if isinstance(value, str):
        if has_image_name(value) or (value and place.rpartition(".")[2] in IMAGE_FIELDS):
            yield place, value
    elif isinstance(value, Mapping):
        for field, inner in value.items():
            yield from _names_below(f"{place}.{field}", inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _names_below(place, inner)


def _in_turn(turn: Any) -> Iterator[str]:
    """The pictures that a turn names: in fields of its own, in its text, in its parts."""
    fields = present(turn) if isinstance(turn, Mapping) else {}
    said = fields.get("value", fields.get("content"))
    own = [_path_of(one) for one in _listed(fields)]
    told = _IMAGE_TAG.findall(said) if isinstance(said, str) else []
    for part in said if isinstance(said, list) else ():
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            named = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key)), None)
            told += [] if named is None else [_path_of(named)]
    if (own or told) and fields.get("from", fields.get("role")) not in ("human", "user"):
        raise UserError(f"its turns name the picture {shown([*own, *told][0])} outside a user's turn; move it there")
    if own and told and own != told:
        raise UserError("a turn's text names other pictures than its 'image' or 'images'; name each once")
    yield from told or own


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
        raise UserError(f"its image stands in its text ({shown(path)}); write it into a file and name that")
    if _ADDRESS.match(path):
        raise UserError(f"its image {shown(path)} is an address; download it and name the file")
    if len(path) > _LONGEST_PATH:
        raise UserError(f"its image {shown(path)} is no path; a picture in base64 must be written into a file")
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
