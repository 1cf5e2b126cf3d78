"""Transparent pixels keep the file's own colour by default, as in the release, or are mixed with the colour chosen."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.exported_code.image_processing_nvlm import NVLMImageProcessor
from megatron_nvlm.image.pixels import check_background, decode_image
from megatron_nvlm.image.tiling import choose_grid
from megatron_nvlm.models.nvlm_model import normalise
from tests.support.pictures import encode, noise

ORANGE = "rgb(250, 120, 10)"


def mixed(rgba: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """By the formula of alpha compositing over an opaque colour: float64 [height, width, 3]."""
    pixels = np.asarray(rgba, dtype=np.float64)
    alpha = pixels[..., 3:] / 255
    return alpha * pixels[..., :3] + (1 - alpha) * np.array(colour)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_pixels_are_mixed_with_the_colour_by_their_alpha(kind: str) -> None:
    picture = noise(37, 23, "RGBA")
    data = encode(picture, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    found = np.asarray(decode_image(data, ORANGE), dtype=np.float64)
    assert np.abs(found - mixed(picture, (250, 120, 10))).max() <= 1
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(picture)[..., :3])


def palette_with_a_hole() -> bytes:
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([0, 0, 0, 200, 0, 0])
    picture.putpixel((3, 3), 1)
    return encode(picture, "PNG", transparency=0)


def grey_with_alpha() -> bytes:
    picture = Image.new("LA", (8, 8), (0, 0))
    picture.putpixel((3, 3), (200, 255))
    return encode(picture, "PNG")


def gif_with_a_hole() -> bytes:
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([0, 0, 0, 200, 0, 0])
    picture.putpixel((3, 3), 1)
    return encode(picture, "GIF", transparency=0)


@pytest.mark.parametrize("make", [palette_with_a_hole, grey_with_alpha, gif_with_a_hole])
def test_every_kind_of_transparency(make) -> None:  # type: ignore[no-untyped-def]
    on_white, dropped = decode_image(make(), "white"), decode_image(make())
    assert on_white.getpixel((0, 0)) == (255, 255, 255) and dropped.getpixel((0, 0)) == (0, 0, 0)
    assert on_white.getpixel((3, 3)) == dropped.getpixel((3, 3)) != (0, 0, 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
def test_opaque_pictures_stay_as_they_are(mode: str) -> None:
    picture = noise(20, 20).convert(mode)
    data = encode(picture, "TIFF" if mode == "CMYK" else "PNG")
    assert decode_image(data, "white").tobytes() == decode_image(data).tobytes()


@given(st.text(max_size=12) | st.sampled_from(["#ffffff80", "transparent", "rgb(1,2)", "rgba(1,2,3,4)", ""]))
def test_a_name_is_a_colour_or_refused(name: str) -> None:
    try:
        check_background(name)
    except UserError as error:
        assert str(error).startswith("tiling.background is ")
    else:
        assert Image.new("RGB", (1, 1), name).getpixel((0, 0))


def test_an_exported_folder_does_the_same() -> None:
    picture = noise(100, 60, "RGBA")
    data = encode(picture, "PNG")
    processor = NVLMImageProcessor(tile_size=56, max_tiles=1, background=ORANGE)
    tile = decode_image(data, ORANGE).resize((56, 56), Image.Resampling.BICUBIC)
    assert choose_grid(100, 60, 1, 56).num_tiles == 1
    expected = np.moveaxis(np.asarray(tile), 2, 0)[None]
    want = normalise(torch.from_numpy(expected.copy()), torch.float32)
    for given_as in (data, picture):
        assert torch.equal(processor.preprocess(given_as)["pixel_values"], want)
    assert not torch.equal(NVLMImageProcessor(tile_size=56, max_tiles=1).preprocess(data)["pixel_values"], want)
