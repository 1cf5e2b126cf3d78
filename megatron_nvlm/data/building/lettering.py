"""Text in pictures, in any script that a font of this machine has: each character in the first font that has it.

Pillow's own font has Latin letters. Others are looked for where systems keep fonts, by the names in `FILES`; Debian's
package fonts-unifont has every script of the basic plane in one file. A character that no font has is written as its code
point. Scripts that join their letters are drawn letter by letter.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

Face = ImageFont.ImageFont | ImageFont.FreeTypeFont

FOLDERS = (
    *(Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), Path("~/.local/share/fonts"), Path("~/.fonts")),
    *(Path("/Library/Fonts"), Path("/System/Library/Fonts"), Path("C:/Windows/Fonts")),
)
"""Where systems keep fonts."""
FILES = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansArabic-Regular.ttf"),
    *("wqy-zenhei.ttc", "unifont.otf", "unifont.ttf", "unifont_upper.otf", "Arial Unicode.ttf", "msyh.ttc"),
)
"""Fonts of many scripts, the better looking ones first."""
_UNASSIGNED = "\U0010fffe"
"""No font has it, so it is drawn as what is missing is."""


@lru_cache(maxsize=8)
def faces(size: int) -> tuple[Face, ...]:
    """Pillow's own font and those that are found, in pixels."""
    found: list[Face] = [ImageFont.load_default(size)]
    for path in _font_files():
        try:
            found.append(ImageFont.truetype(path, size))
        except OSError:  # of a format that this FreeType does not read
            continue
    return tuple(found)


@lru_cache(maxsize=1)
def _font_files() -> tuple[Path, ...]:
    there = {path.name: path for folder in FOLDERS for path in folder.expanduser().rglob("*.[ot]t[fc]")}
    return tuple(there[name] for name in FILES if name in there)


def find_missing(text: str) -> set[str]:
    """Characters that no font has."""
    return {character for character in set(text) if _find_face(character, 14) is None}


def text_width(text: str, size: int) -> float:
    """In pixels, as `write_text` writes it."""
    return sum(face.getlength(piece) for face, piece in _pieces(text, size))


def write_text(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, colour: tuple[int, int, int], size: int
) -> None:
    """Write a line from a place, its left upper corner."""
    left, top = place
    for face, piece in _pieces(text, size):
        draw.text((left, top), piece, colour, face)
        left += face.getlength(piece)


def _pieces(text: str, size: int) -> Iterator[tuple[Face, str]]:
    """The text in pieces of one font each."""
    first, *_ = faces(size)
    chosen = [(_find_face(character, size), character) for character in text]
    for face, group in groupby(chosen, key=lambda pair: pair[0]):
        piece = "".join(character for _, character in group)
        yield (face, piece) if face is not None else (first, "".join(f"U+{ord(one):04X}" for one in piece))


@lru_cache(maxsize=4096)
def _find_face(character: str, size: int) -> Face | None:
    if not character.isprintable():
        return faces(size)[0]
    return next((face for face in faces(size) if _has(face, character)), None)


def _has(face: Face, character: str) -> bool:
    drawn, missing = face.getmask(character), face.getmask(_UNASSIGNED)
    return (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))
