"""A damaged picture is a picture still, or one sentence: whatever Pillow raises on it, and wherever."""

import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image, ImageFile, ImageOps

from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import decode_image, read_header, upright_rgb
from tests.support.pictures import KINDS, avif_with_a_hole, damaged_files, noise, unreadable_exif, with_exif

ERRORS = (
    struct.error("unpack requires a buffer of 4 bytes"),
    SyntaxError("not a TIFF file"),
    ValueError("bad"),
    ZeroDivisionError("division by zero"),
    OverflowError("too large"),
    MemoryError(),
    RuntimeError("Failed to decode image"),
    RecursionError("maximum recursion depth exceeded"),
    KeyError(274),
    AttributeError("tag_v2"),
    Image.DecompressionBombError("could be decompression bomb"),
    OSError("two\nlines"),
)


def test_damaged_files_of_every_kind_are_a_picture_or_a_sentence() -> None:
    """350 files. What decodes has a header of the same size, by which shards are indexed."""
    ends: Counter[tuple[str, str]] = Counter()
    for kind, data in damaged_files(50):
        try:
            picture = decode_image(data)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            ends[kind, "sentence"] += 1
            continue
        header = read_header(data)
        assert picture.mode == "RGB" and picture.size == (header.width, header.height)
        ends[kind, "picture"] += 1
    assert sum(ends.values()) == 350
    assert all(ends[kind, "sentence"] for kind in KINDS)
    assert all(ends[kind, "picture"] for kind in KINDS if kind != "PNG")  # a PNG has checksums


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (unreadable_exif(), "the image cannot be decoded (not a TIFF file"),
        (avif_with_a_hole(), "the image cannot be decoded (Failed to decode"),
    ],
)
def test_what_pillow_raises_beside_oserror(data: bytes, says: str) -> None:
    with pytest.raises(UserError) as caught:
        decode_image(data)
    assert str(caught.value).startswith(says) and str(caught.value).endswith("; replace the file")


@pytest.mark.parametrize("raised", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", ["open", "load", "exif_transpose", "convert"])
def test_any_error_of_any_step_is_one_sentence(step: str, raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise raised

    data, grey = with_exif("GIF"), noise(9, 9, "L")
    owner: Any = {"open": Image, "exif_transpose": ImageOps}.get(step, Image.Image)
    monkeypatch.setattr(ImageFile.ImageFile if step == "load" else owner, step, fail)
    calls: list[Callable[[], Any]] = [lambda: decode_image(data)]
    calls += [lambda: read_header(data)] if step == "open" else []
    calls += [lambda: upright_rgb(grey)] if step in ("exif_transpose", "convert") else []
    for call in calls:
        with pytest.raises(UserError, match="cannot be decoded") as caught:
            call()
        assert "\n" not in str(caught.value) and "()" not in str(caught.value)


def test_an_interruption_is_no_fault_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode_image(b"")
