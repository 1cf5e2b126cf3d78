"""Tile pixels equal the rule, and image files of every kind become the RGB that a viewer shows."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import IMAGENET, MAX_PIXELS, decode_image, read_header, to_array
from megatron_nvlm.image.tiling import Grid, choose_grid, cut_tiles
from megatron_nvlm.models.nvlm_model import normalise
from tests.support.pictures import encode, noise


@pytest.mark.parametrize("size", [(640, 480), (1, 1), (100, 700), (449, 447)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_tiles_equal_the_rule(size: tuple[int, int], mode: str) -> None:
    """Convert to RGB, bicubic to the whole canvas, crop row by row, divide by 255, ImageNet's statistics."""
    image, tile_size = noise(*size).convert(mode), 112
    grid = choose_grid(*size, 6, tile_size)
    ours = normalise(
        torch.from_numpy(np.stack([to_array(tile) for tile in cut_tiles(image, grid, tile_size)])), torch.float64
    )
    canvas = image.convert("RGB").resize((tile_size * grid.cols, tile_size * grid.rows), Image.Resampling.BICUBIC)
    pictures = [
        canvas.crop((col * tile_size, row * tile_size, (col + 1) * tile_size, (row + 1) * tile_size))
        for row in range(grid.rows)
        for col in range(grid.cols)
    ]
    if len(pictures) > 1:
        pictures.append(image.convert("RGB").resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    rule = np.stack([(np.asarray(p, dtype=np.float64) / 255 - IMAGENET.mean) / IMAGENET.std for p in pictures])
    assert ours.shape == (grid.num_pictures, 3, tile_size, tile_size)
    np.testing.assert_allclose(ours.numpy(), rule.transpose(0, 3, 1, 2), atol=1e-12)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    """The corner that EXIF calls the top left one is the top left one."""
    upright = Image.new("RGB", (48, 32), (10, 10, 10))
    upright.paste((250, 20, 20), (0, 0, 16, 16))
    # What a camera held that way stores: the inverse of what a viewer does.
    inverse = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if inverse is None else upright.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless: dict[str, object] = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}}[kind]  # type: ignore
    seen = decode_image(encode(stored, kind, exif=exif, **lossless))
    assert seen.size == (48, 32)
    assert np.abs(np.asarray(seen, dtype=int) - np.asarray(upright, dtype=int)).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_formats(kind: str) -> None:
    image = Image.new("RGB", (40, 30), (200, 60, 120))
    seen = decode_image(encode(image, kind))
    assert seen.mode == "RGB" and seen.size == (40, 30)
    assert np.abs(np.asarray(seen, dtype=int) - np.array([200, 60, 120])).max() <= 6


def test_cmyk_jpeg() -> None:
    """Pillow's own conversion, without a colour profile; Adobe's inverted CMYK comes out upright."""
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    seen = np.asarray(decode_image(encode(image, "JPEG", quality=95)))
    assert np.abs(seen.astype(int) - np.array([255, 0, 0])).max() <= 6


def test_palette_and_transparency() -> None:
    palette = noise(20, 20).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    expected = np.asarray(palette.convert("RGB"))
    assert (np.asarray(decode_image(encode(palette, "PNG"))) == expected).all()
    assert (np.asarray(decode_image(encode(palette, "PNG", transparency=0))) == expected).all()
    rgba = noise(20, 20, "RGBA")
    assert (np.asarray(decode_image(encode(rgba, "PNG"))) == np.asarray(rgba)[..., :3]).all()
    grey_alpha = noise(20, 20, "LA")
    assert (np.asarray(decode_image(encode(grey_alpha, "PNG"))) == np.asarray(grey_alpha)[..., :1]).all()


def test_one_bit_images() -> None:
    image = Image.fromarray((np.arange(400).reshape(20, 20) % 3 == 0).astype(np.uint8) * 255).convert("1")
    assert (np.asarray(decode_image(encode(image, "PNG")))[..., 0] == np.asarray(image.convert("L"))).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    seen = np.asarray(decode_image(encode(Image.fromarray(values), kind)))
    assert (seen == (values >> 8).astype(np.uint8)[..., None]).all()


@pytest.mark.parametrize("kind", ["PPM", "JPEG2000"])
def test_sixteen_bit_grey_of_other_kinds(kind: str) -> None:
    """Pillow opens a PGM of 16 bits in the mode of 32."""
    values = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    assert (np.asarray(decode_image(encode(Image.fromarray(values), kind)))[..., 0] == values >> 8).all()


def test_twelve_bit_grey_does_not_become_dark() -> None:
    """Pillow cannot write such a TIFF, so its bytes are made here: the numbers 0, 16, ... 4080, two in three bytes."""
    values = np.arange(256) << 4
    packed = b"".join(
        ((int(a) << 12) | int(b)).to_bytes(3, "big") for a, b in zip(values[::2], values[1::2], strict=True)
    )
    tags = [(256, 16), (257, 16), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16), (279, len(packed))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    tiff = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory + bytes(4)
    assert (np.asarray(decode_image(tiff))[..., 0].ravel() == np.arange(256)).all()


@pytest.mark.parametrize("kind", [np.int32, np.float32, np.int16])
@pytest.mark.parametrize("turned", [False, True])
def test_numbers_of_unknown_range_are_refused(kind: type, turned: bool) -> None:
    """Scaled by any rule they would be black, or white, in one file or the other."""
    values = np.linspace(0, 1 if kind is np.float32 else 255, 256).astype(kind).reshape(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    if kind is np.int16:
        image = encode(Image.fromarray(values.astype(np.uint16)), "TIFF", tiffinfo={339: 2}, exif=exif)
    else:
        image = encode(Image.fromarray(values), "TIFF", exif=exif)
    with pytest.raises(UserError, match=r"of unknown range \(Pillow's mode [IF]\), .*; save it with 8 or 16 bits"):
        decode_image(image)


def test_sixteen_bit_colour_keeps_its_high_bytes() -> None:
    """Pillow cannot write such a PNG, so its bytes are made here."""
    values = np.random.default_rng(1).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    assert (np.asarray(decode_image(png)) == (values >> 8).astype(np.uint8)).all()


def test_a_colour_profile_is_not_applied() -> None:
    """As in the release: the numbers of the file are what the model sees."""
    image = noise(16, 16)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert (np.asarray(decode_image(encode(image, "PNG", icc_profile=profile))) == np.asarray(image)).all()


def test_only_the_first_frame_of_an_animation_is_taken() -> None:
    first, second = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    seen = decode_image(encode(first, "WEBP", save_all=True, append_images=[second], lossless=True))
    assert seen.getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "cannot be decoded"),
        (b"no picture", "cannot be decoded"),
        (encode(noise(64, 64), "JPEG")[:700], "cannot be decoded"),
        (encode(noise(64, 64), "PNG")[:-500], "cannot be decoded"),
        (encode(noise(64, 64), "WEBP")[:700], "cannot be decoded"),
    ],
)
def test_broken_files_say_so(data: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        decode_image(data)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    edge = int(MAX_PIXELS**0.5) + 1
    header = struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )
    with pytest.raises(UserError, match="over the limit|cannot be decoded"):
        decode_image(png)


def test_a_grid_of_one_tile_has_no_thumbnail_beside_it() -> None:
    assert len(cut_tiles(noise(30, 30), Grid(1, 1), 56)) == 1
    assert len(cut_tiles(noise(30, 30), Grid(2, 1), 56)) == 3


@pytest.mark.parametrize("read", [decode_image, read_header])
def test_a_large_picture_below_the_limit_brings_no_warning(read: object, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 12)).save(buffer, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(buffer.getvalue()).width == 12  # type: ignore[operator]
