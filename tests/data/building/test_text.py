"""Text of other encodings: the byte order mark is dropped, the rest is one named reject and never another text."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.data.building.builds import build, build_lines, build_tar, coloured, turns_of

UMLAUT = "Größe"
TALK = {"question": "Wie groß?", "answer": UMLAUT}


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    marked = b"\xef\xbb\xbf" + json.dumps(TALK).encode()
    samples, rejects = build_lines(tmp_path / "lines", marked, {"text": "\ufeffA text."})
    assert rejects == [] and [turns_of(one)[-1] for one in samples] == [("gpt", UMLAUT), ("gpt", "A text.")]
    (sample,), rejects = build_tar(
        tmp_path / "tar", ("a.png", coloured("red")), ("a.txt", b"\xef\xbb\xbf" + UMLAUT.encode())
    )
    assert rejects == [] and turns_of(sample)[-1] == ("gpt", UMLAUT)


def test_a_folder_s_captions(tmp_path: Path) -> None:
    captions = {"utf8": UMLAUT.encode(), "marked": b"\xef\xbb\xbfRed.", "latin": UMLAUT.encode("latin-1")}
    for name, caption in captions.items():
        (tmp_path / f"{name}.png").write_bytes(coloured("red"))
        (tmp_path / f"{name}.txt").write_bytes(caption)
    samples, rejects = build(tmp_path / "set", "--folder", tmp_path)
    assert {turns_of(one)[-1][1] for one in samples} == {UMLAUT, "Red."}
    (reject,) = rejects
    assert reject.startswith("its caption latin.txt is not UTF-8 (byte 0xf6 at 2)") and "iconv" in reject


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.txt", UMLAUT.encode("latin-1"))], "its caption .txt is not UTF-8"),
        ([("a.json", json.dumps({"caption": UMLAUT}, ensure_ascii=False).encode("latin-1"))], "is not UTF-8"),
        ([("a.json", b'{"caption": "half \\ud83d"}')], "half of a character"),
    ],
)
def test_a_tar_s_captions(tmp_path: Path, members: list[tuple[str, bytes]], words: str) -> None:
    good = [("b.png", coloured("blue")), ("b.txt", "Blue.")]
    samples, (reject,) = build_tar(tmp_path, ("a.png", coloured("red")), *members, *good)
    assert words in reject and [turns_of(one)[-1] for one in samples] == [("gpt", "Blue.")]


def test_lines_of_another_encoding_and_halves_of_characters(tmp_path: Path) -> None:
    gbk = json.dumps({"question": "?", "answer": "\u4f60\u597d"}, ensure_ascii=False).encode("gbk")
    half = b'{"question": "?", "answer": "\\udc00"}'
    samples, rejects = build_lines(tmp_path, gbk, half, TALK)
    assert len(samples) == 1 and "is not UTF-8" in rejects[0] and "half of a character" in rejects[1]


def test_names_of_files_and_keys_that_are_no_utf8(tmp_path: Path) -> None:
    name = b"\xc4\xe3.png"  # in GBK
    folder = tmp_path / "folder"
    folder.mkdir()
    (Path(bytes(folder).decode()) / name.decode(errors="surrogateescape")).write_bytes(coloured("red"))
    (folder / "good.png").write_bytes(coloured("blue"))
    for stem in (name.decode(errors="surrogateescape").removesuffix(".png"), "good"):
        (folder / f"{stem}.txt").write_text("A caption.")
    samples, (reject,) = build(tmp_path / "set", "--folder", folder)
    assert len(samples) == 1 and "is not UTF-8; rename it" in reject
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member, content in (
            ("XX.png", coloured("red")),
            ("XX.txt", b"Red."),
            ("b.txt", b"A text."),
            ("b.png", coloured("blue")),
        ):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    named = _rename(data.getvalue(), b"XX.", b"\xc4\xe3.")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(named)
    samples, (reject,) = build(tmp_path / "other", "--webdataset", tmp_path / "tars")
    assert len(samples) == 1 and "is not UTF-8; rename it" in reject


def _rename(data: bytes, old: bytes, new: bytes) -> bytes:
    """The tar with other names, and headers' sums that fit them."""
    blocks = [bytearray(data[place : place + 512]) for place in range(0, len(data), 512)]
    for block in blocks:
        if block[257:262] == b"ustar" and block.startswith(old):
            block[: len(old)] = new
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)
