"""A telephone's MPO is stored as the JPEG of its first picture, with its own bytes."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from megatron_nvlm.data.building.mpo import first_picture
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import decode_image, read_header
from tests.data.building.builds import build, build_tar
from tests.support.pictures import encode, noise, with_exif


def telephone(progressive: bool = False, turned: int = 6) -> bytes:
    """An MPO as a telephone writes it: a large picture that lies on its side, restart markers, and a small one after it."""
    large = noise(640, 480).filter(ImageFilter.GaussianBlur(2))
    exif = Image.Exif()
    exif[0x0112] = turned
    options = {"progressive": True} if progressive else {"restart_marker_rows": 1}
    behind = [large.resize((320, 240)), large.resize((64, 48))]
    return encode(large, "MPO", save_all=True, append_images=behind, exif=exif, icc_profile=b"profile", **options)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_telephones_picture_stays_a_jpeg(tmp_path: Path, progressive: bool) -> None:
    data = telephone(progressive)
    assert read_header(data).format == "MPO"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(data)
    (tmp_path / "in" / "a.txt").write_text("words")
    (sample,), rejects = build(tmp_path / "set", "--folder", tmp_path / "in")
    stored = sample.pictures["0.jpg"]
    assert rejects == [] and list(sample.pictures) == ["0.jpg"]
    assert (np.asarray(decode_image(stored)) == np.asarray(decode_image(data))).all()
    assert len(stored) < len(data) < 0.3 * len(encode(decode_image(data), "PNG"))
    with Image.open(io.BytesIO(stored)) as image:
        assert image.format == "JPEG" and image.getexif()[0x0112] == 6 and image.info["icc_profile"] == b"profile"
    assert stored.endswith(b"\xff\xd9") and b"MPF\0" not in stored and stored[-1000:] in data
    assert (sample.record["images"][0]["width"], sample.record["images"][0]["height"]) == (480, 640)


def test_an_mpo_of_a_tar_is_known_by_its_suffix(tmp_path: Path) -> None:
    (sample,), rejects = build_tar(tmp_path, ("0.mpo", telephone()), ("0.json", '{"text": "words"}'))
    assert rejects == [] and list(sample.pictures) == ["0.jpg"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_other_files_stay_as_they_are(kind: str) -> None:
    data = with_exif(kind)
    assert first_picture(data) == data
    behind = with_exif("JPEG") + b"what some cameras write after their picture"
    assert first_picture(behind) == behind


def test_filling_between_segments_is_passed_over() -> None:
    data = telephone()
    place = data.index(b"\xff\xdb")
    filled = data[:place] + b"\xff\xff" + data[place:]
    assert (np.asarray(decode_image(first_picture(filled))) == np.asarray(decode_image(data))).all()


def test_what_follows_no_rule_but_decodes_is_kept_whole(tmp_path: Path) -> None:
    """Stray bytes between segments, which libjpeg passes over."""
    data = telephone()
    place = data.index(b"\xff\xc0")
    stray = data[:place] + b"stray" + data[place:]
    samples, rejects = build_tar(tmp_path, ("0.mpo", stray), ("0.json", '{"text": "words"}'))
    assert rejects == [] and samples[0].pictures == {"0.jpg": stray}


def test_wherever_an_mpo_breaks_off_it_is_whole_or_a_sentence() -> None:
    """Cut within the second picture the first is whole; cut within the first it is refused."""
    data, whole = with_exif("MPO"), first_picture(with_exif("MPO"))
    left_out = data.index(whole[-400:]) + 400 - len(whole)
    for end in range(2, len(data), 7):
        try:
            cut = first_picture(data[:end])
            decode_image(cut)
            assert cut == whole and end >= len(whole) + left_out
        except UserError as error:
            assert "\n" not in str(error) and end < len(whole) + left_out
