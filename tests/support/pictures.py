"""Small valid picture files of many kinds, and what chance makes of them."""

import io
import random
from typing import Any

import numpy as np
from PIL import Image

KINDS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF", "MPO")
NAMES = {"PNG": "png", "JPEG": "jpg", "GIF": "gif", "WEBP": "webp", "TIFF": "tif", "AVIF": "avif", "MPO": "mpo"}
"""How files of each kind end."""


def noise(width: int, height: int, mode: str = "RGB", seed: int = 1) -> Image.Image:
    """A picture of random pixels."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, bands) if bands > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_exif(kind: str, width: int = 32, height: int = 24) -> bytes:
    """A small valid file, with an orientation and a nested EXIF directory where the kind has them; an MPO has two frames."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    exif.get_ifd(0x8769)[0x9286] = b"a comment"
    options: dict[str, Any] = {} if kind == "GIF" else {"exif": exif}
    if kind == "MPO":
        options.update(save_all=True, append_images=[noise(width, height, seed=2)])
    return encode(noise(width, height), kind, **options)


def damage(data: bytes, seed: int) -> bytes:
    """The bytes with a few changed, near their beginning above all, and a piece cut out now and then."""
    chance, changed = random.Random(seed), bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 10))):
        most = len(changed) if chance.random() < 0.5 else min(len(changed), 250)
        changed[chance.randrange(most)] = chance.randrange(256)
    if chance.random() < 0.2:
        start = chance.randrange(len(changed))
        del changed[start : start + chance.randrange(1, 60)]
    return bytes(changed)


def damaged_files(each: int) -> list[tuple[str, bytes]]:
    """(kind, bytes) of so many damaged files of each kind."""
    return [
        (kind, damage(with_exif(kind), 1000 * place + seed)) for place, kind in enumerate(KINDS) for seed in range(each)
    ]


def unreadable_exif() -> bytes:
    """A WebP whose pixels are whole and whose EXIF begins as nothing does: Pillow raises SyntaxError for its orientation."""
    data = with_exif("WEBP")
    place = data.index(b"MM\0*")
    return data[:place] + b"XX" + data[place + 2 :]


def avif_with_a_hole() -> bytes:
    """An AVIF without the place of its pixels: Pillow raises RuntimeError."""
    data = bytearray(with_exif("AVIF"))
    place = data.index(b"iloc")
    data[place + 22 : place + 26] = bytes(4)  # the length of its first item
    return bytes(data)
