"""A build over damaged pictures ends with a set and one reject for each that is none, named by its file."""

import json
from pathlib import Path

import pytest

from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import decode_image
from tests.data.building.builds import build
from tests.support.pictures import NAMES, avif_with_a_hole, damaged_files, unreadable_exif


@pytest.mark.parametrize("images", ["tiles", "whole"])
def test_each_damaged_picture_is_a_sample_or_a_reject(tmp_path: Path, images: str) -> None:
    folder, refused, count = tmp_path / "folder", set(), 0
    folder.mkdir()
    files = [*damaged_files(50), ("WEBP", unreadable_exif()), ("AVIF", avif_with_a_hole())]
    for count, (kind, data) in enumerate(files, 1):
        path = folder / f"{count:04d}.{NAMES[kind]}"
        path.write_bytes(data)
        path.with_suffix(".txt").write_text("words")
        try:
            decode_image(data)
        except UserError:
            refused.add(str(path))
    samples, rejects = build(tmp_path / "set", "--folder", folder, images=images)
    lines = (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()
    assert {json.loads(line)["where"] for line in lines} == refused and len(lines) == len(refused)
    assert len(samples) + len(rejects) == count == 352
    assert all(reject.startswith("its image 0: ") and "\n" not in reject for reject in rejects)
