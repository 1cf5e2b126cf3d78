"""Bytes of an image file to RGB pixels, and the statistics that normalise them."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

from megatron_nvlm.errors import UserError


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and deviation of each channel, for values from 0 to 1, by which a vision model's pixels are normalised."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = PixelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""InternViT's, by the release's image processor."""
HALVES = PixelStatistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""SigLIP's, by its preprocessor_config.json."""

MAX_PIXELS = 178_956_970
"""Twice Pillow's warning threshold, where Pillow itself takes an image for a decompression bomb."""
_ORIENTATION = int(ExifTags.Base.Orientation)
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
_BITS_PER_SAMPLE = 258
"""TIFF's tag."""


def check_image_size(width: int, height: int) -> None:
    """Refuse sizes that no image has or that would exhaust memory."""
    if width < 1 or height < 1:
        raise UserError(f"an image of {width}x{height} pixels has no content")
    if width * height > MAX_PIXELS:
        raise UserError(f"an image of {width}x{height} pixels is over the limit of {MAX_PIXELS} pixels; scale it down")


def check_background(name: str | None) -> None:
    """Raise UserError unless the name is that of an opaque colour, or null."""
    if name is None:
        return
    try:
        is_opaque = len(ImageColor.getrgb(name)) == 3
    except ValueError:
        is_opaque = False
    if not is_opaque:
        raise UserError(
            f"tiling.background is {name[:40]!r}, which is no opaque colour; give one such as white or "
            "'rgb(255, 255, 255)', or null to drop transparency"
        )


@contextmanager
def picture_faults(what: str = "the image cannot be decoded", fix: str = "replace the file") -> Iterator[None]:
    """Whatever is raised within, on a damaged picture, becomes one sentence: the one place for that.

    Pillow's readers raise many kinds (struct.error, SyntaxError, RuntimeError, MemoryError, ...), which change with its
    versions, so none is named here.

    Raises:
        UserError: `what` happened, why, and how to fix it; one that was raised within stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:  # its message holds an address in memory
        raise UserError(f"{what} (its bytes are of no known format); {fix}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{what} ({reason}); {fix}") from error


@dataclass(frozen=True)
class PictureHeader:
    """What the beginning of an image file says."""

    format: str
    """By Pillow's name."""
    width: int
    height: int
    """In pixels, of the upright picture."""
    mode: str
    """By Pillow's name."""


def read_header(data: bytes) -> PictureHeader:
    """An image file's header, without decoding the picture.

    Raises:
        UserError: it is that of no image, or of one that `decode_image` would refuse by its size.
    """
    with picture_faults(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            check_image_size(width, height)
            # Pillow says a TIFF's size as it is once upright.
            if image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _SIDEWAYS:
                width, height = height, width
            return PictureHeader(image.format or "", width, height, image.mode)


def decode_image(data: bytes, background: str | None = None) -> Image.Image:
    """An image file's bytes -> RGB image, upright.

    EXIF orientation is applied; CMYK, palette and 16-bit images become 8-bit RGB as Pillow converts them (12- and 16-bit
    grey is scaled down first, which Pillow's own conversion would clip); colour profiles are not applied, as in the release;
    of an animation the first frame is taken.

    Args:
        background: colour behind transparent pixels; None drops transparency, as in the release.

    Raises:
        UserError: the bytes are no complete image, or its numbers have no known range (signed, 32-bit or float TIFF).
    """
    with picture_faults(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the limit
        return upright_rgb(Image.open(io.BytesIO(data)), in_place=True, background=background)


def upright_rgb(image: Image.Image, in_place: bool = False, background: str | None = None) -> Image.Image:
    """An opened image -> RGB image, upright, as `decode_image` describes.

    Args:
        in_place: the given image may be changed.
        background: colour behind transparent pixels; None drops transparency.

    Raises:
        UserError: it is no complete image, or its numbers have no known range.
    """
    with picture_faults():
        check_image_size(*image.size)
        bits = _bits_of_grey(image)
        image.load()
        if in_place:
            ImageOps.exif_transpose(image, in_place=True)
        else:
            image = ImageOps.exif_transpose(image)
        if image.mode == "RGB":
            return image
        if bits > 8:
            return Image.fromarray((np.asarray(image, dtype=np.uint32) >> (bits - 8)).astype(np.uint8)).convert("RGB")
        return image.convert("RGB") if background is None else _on_background(image, background)


def _on_background(image: Image.Image, background: str) -> Image.Image:
    """An 8-bit image of any mode -> RGB, transparent pixels mixed with the colour by their alpha."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, background)
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _bits_of_grey(image: Image.Image) -> int:
    """Bits of a channel's numbers, by which Pillow's wide grey modes are scaled to 8.

    Raises:
        UserError: the file does not say how large they get.
    """
    if image.mode.startswith("I;16"):
        in_tiff = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
        return 12 if in_tiff == (12,) else 16
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits that Pillow widens
        return 16
    if image.mode in ("I", "F"):
        raise UserError(
            f"the image's pixels are {'integers' if image.mode == 'I' else 'fractions'} of unknown range (Pillow's mode "
            f"{image.mode}), so which is white is not known; save it with 8 or 16 bits a channel"
        )
    return 8


def to_array(tile: Image.Image) -> np.ndarray:
    """A square RGB tile -> uint8 [3, S, S]."""
    array = np.empty((3, tile.height, tile.width), dtype=np.uint8)
    write_array(tile, array)
    return array


def write_array(tile: Image.Image, out: np.ndarray) -> None:
    """A square RGB tile into uint8 [3, S, S]. By Pillow's own channels: four times as fast as to transpose pixels."""
    for channel, name in enumerate("RGB"):
        out[channel] = np.frombuffer(tile.tobytes("raw", name), np.uint8).reshape(out.shape[1:])
