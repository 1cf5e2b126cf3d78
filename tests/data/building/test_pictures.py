"""A picture is never lost: however a line names it and wherever it stands in a tar, it is there or named in a reject."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.data.building.lint import Check, lint
from tests.data.building.builds import build, build_lines, build_tar, coloured, colours_of, turns_of, write_tar

ROOT = Path(__file__).parents[3]
RED, GREEN, BLUE = coloured("red"), coloured("green"), coloured("blue")
PLAIN = json.dumps({"question": "What?", "answer": "This."})
TEXT = json.dumps({"text": "A square"})
APPLE = b"\0\5\x16\7" + b"x" * 50
"""How macOS' ._ files begin."""


def talk(asked: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "Red."}]}


def turn_with(value: str = "?", **fields: Any) -> dict[str, Any]:
    """A conversation whose user's turn has fields of its own."""
    return {"conversations": [{"from": "human", "value": value, **fields}, {"from": "gpt", "value": "Red."}]}


@pytest.mark.parametrize(
    ("line", "asked", "colours"),
    [
        ({"file_name": "red.png", "text": "A square"}, "<image>\nDescribe the image briefly.", ["red"]),
        (talk("Picture 1: <img>red.png</img>\nWhat?"), "Picture 1: <image>\nWhat?", ["red"]),
        (talk("<img>blue.png</img> or <img> red.png </img>?"), "<image> or <image>?", ["blue", "red"]),
        ({"question": "<img>red.png</img>?", "answer": "x"}, "<image>?", ["red"]),
        (talk([{"type": "image", "image": "red.png"}, {"type": "text", "text": "?"}]), "<image>?", ["red"]),
        (talk([{"type": "image_url", "image_url": {"url": "file://green.png"}}]), "<image>", ["green"]),
        ({"images": [{"bytes": None, "path": "red.png"}], **talk("?")}, "<image>\n?", ["red"]),
        (talk("<IMG>\n red.png\n</IMG>?"), "<image>?", ["red"]),
        (turn_with(image="red.png"), "<image>\n?", ["red"]),
        (
            turn_with(images=["red.png", "blue.png"], value="<image> or <image>?"),
            "<image> or <image>?",
            ["red", "blue"],
        ),
        ({"images": ["red.png"], **turn_with(image="red.png")}, "<image>\n?", ["red"]),
        ({"image": "red.png", "images": ["red.png"], **talk("?")}, "<image>\n?", ["red"]),
        ({"image": "./red.png", "file_name": "red.png", **talk("?")}, "<image>\n?", ["red"]),
    ],
)
def test_every_way_to_name_a_picture(tmp_path: Path, line: dict[str, Any], asked: str, colours: list[str]) -> None:
    (sample,), rejects = build_lines(tmp_path, line)
    assert rejects == [] and colours_of(sample) == colours
    assert turns_of(sample)[0] == ("human", asked)


def test_a_line_that_names_a_picture_never_becomes_text(tmp_path: Path) -> None:
    lines: list[tuple[dict[str, Any], str]] = [
        ({"img": "red.png", **talk("What?")}, "its 'img' names the picture 'red.png', and pictures are read from"),
        ({"pictures": ["red.png"], "text": "A square"}, "its 'pictures' names the picture"),
        ({"url": "https://a.org/b.JPG?size=2", "text": "A square"}, "its 'url' names the picture"),
        ({"image": "https://a.org/b.jpg", **talk("What?")}, "is an address; download it"),
        ({"image": "data:image/png;base64,AAAA", **talk("What?")}, "its image 0: the image cannot be decoded"),
        ({"image": {"bytes": "AAAA", "path": None}, **talk("What?")}, "its image 0: the image cannot be decoded"),
        ({"image": {"bytes": None, "path": None}, **talk("What?")}, "neither a path nor a list of paths"),
        ({"image": "red.png", **talk("<img>blue.png</img>")}, "its turns name other pictures"),
        ({"file_name": "missing.png", "text": "A square"}, "missing.png cannot be read"),
        (
            {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "<img>red.png</img>"}]},
            "outside a user's turn",
        ),
        ({"system": "See <img>red.png</img>", **talk("What?")}, "its 'system' names the picture 'red.png'"),
        ({"text": "<Img>red.png</Img> is red"}, "its 'text' names the picture 'red.png'"),
        ({"meta": {"source": [{"image": "red.png"}]}, **talk("?")}, "its 'meta.source.image' names the picture"),
        ({"meta": {"images": ["000123"]}, "text": "A square"}, "its 'meta.images' names the picture '000123'"),
        (turn_with(picture={"path": "red.png"}), "its 'conversations.picture.path' names the picture 'red.png'"),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x", "image": "red.png"}]},
            "names the picture 'red.png' outside a user's turn",
        ),
        (turn_with(image="red.png", value="<img>blue.png</img>?"), "names in its text other pictures ('blue.png')"),
        (
            {"image": "red.png", "images": ["blue.png"], **talk("?")},
            "its 'image' names 'red.png' and its 'images' names 'blue.png'",
        ),
        ({"image": "red.png", "file_name": "blue.png", **talk("?")}, "and its 'file_name' names 'blue.png'"),
        (
            {"image": "QUJD" * 2000, **talk("?")},
            "'QUJDQUJDQUJDQUJDQUJDQUJDQUJDQUJDQUJDQUJD'... (8000 characters), which is no path",
        ),
    ]
    samples, rejects = build_lines(tmp_path, *(line for line, _ in lines))
    assert samples == [] and len(rejects) == len(lines)
    for reject, (_, says) in zip(rejects, lines, strict=True):
        assert says in reject


def test_a_text_with_a_file_name_stays_text(tmp_path: Path) -> None:
    samples, rejects = build_lines(tmp_path, {"file_name": "words.txt", "url": "https://a.org", "text": "Words."})
    assert rejects == [] and turns_of(samples[0]) == [("gpt", "Words.")]


@pytest.mark.parametrize("suffix", ["AVIF", "jfif", "Jpe", "image", ""])
def test_pictures_of_a_tar_are_known_by_suffix_or_by_their_bytes(tmp_path: Path, suffix: str) -> None:
    data = coloured("red", "AVIF" if suffix == "AVIF" else "JPEG")
    name = f"0.{suffix}" if suffix else "0"
    samples, rejects = build_tar(tmp_path, (name, data), ("0.json", PLAIN), ("1.json", TEXT), (f"1.{suffix}", data))
    assert rejects == [] and [colours_of(sample) for sample in samples] == [["red"], ["red"]]


def test_a_picture_that_cannot_be_decoded_is_a_reject_and_no_text(tmp_path: Path) -> None:
    samples, rejects = build_tar(tmp_path, ("0.heic", b"no picture"), ("0.json", TEXT))
    assert samples == [] and "its image 0: the image cannot be decoded" in rejects[0]


def test_members_of_a_key_may_stand_apart(tmp_path: Path) -> None:
    """And keys that come twice stay two samples."""
    members = [("0.png", RED), ("1.png", BLUE), ("0.json", PLAIN), ("1.json", PLAIN), ("0.txt", "x")]
    samples, rejects = build_tar(tmp_path, *members)
    assert rejects == [] and [colours_of(sample) for sample in samples] == [["red"], ["blue"]]
    assert [sample.record["id"] for sample in samples] == ["0", "1"]
    twice = [("0.png", RED), ("0.txt", "r"), ("1.png", GREEN), ("1.txt", "g"), ("0.png", BLUE), ("0.txt", "b")]
    samples, rejects = build_tar(tmp_path / "twice", *twice)
    assert rejects == []
    assert [(colours_of(sample), turns_of(sample)[1][1]) for sample in samples] == [
        (["red"], "r"),
        (["green"], "g"),
        (["blue"], "b"),
    ]


def test_hidden_members_part_nothing(tmp_path: Path) -> None:
    members = [("._0.png", APPLE), ("0.png", RED), ("d/._0.json", APPLE), ("0.json", PLAIN), (".DS_Store", b"x")]
    samples, rejects = build_tar(tmp_path, *members)
    assert rejects == [] and [colours_of(sample) for sample in samples] == [["red"]]


def test_links_stand_for_their_file(tmp_path: Path) -> None:
    link, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    samples, rejects = build_tar(
        tmp_path,
        ("a/0.png", RED),
        ("a/0.json", PLAIN),
        ("a/1.png", (link, "a/0.png")),
        ("a/1.json", PLAIN),
        ("b/2.json", TEXT),
        ("b/2.png", (soft, "../a/1.png")),
        ("3.json", TEXT),
        ("3.png", (soft, "/elsewhere/3.png")),
        ("4.json", TEXT),
    )
    assert [colours_of(sample) for sample in samples] == [["red"], ["red"], ["red"], []]
    assert rejects == ["its 3.png is a link to /elsewhere/3.png, which the tar does not hold before it; pack the file"]
    faults = lint(tmp_path / "tars", Check()).faults
    assert [fault.kind for fault in faults if "is a link to /elsewhere/3.png" in fault.message] == ["member"]


@pytest.mark.parametrize(
    ("members", "content", "colours"),
    [
        ({"first.png": BLUE, "second.png": RED}, {"images": ["second.png", "first.png"]}, ["red", "blue"]),
        ({"first.png": BLUE, "second.png": RED}, {"images": ["x/0.second.png", "0.first.png"]}, ["red", "blue"]),
        ({"png": RED, "seg.png": GREEN}, {}, ["red"]),
        ({"seg.png": GREEN, "png": RED}, {"image": "photos/cat.jpg"}, ["red"]),
        ({"png": RED, "seg.png": GREEN}, {"images": ["0.png", "0.seg.png"]}, ["red", "green"]),
        ({"image.png": RED, "mask.png": GREEN}, {}, ["red"]),
        ({"10.png": RED, "2.png": GREEN}, {}, ["green", "red"]),
        ({"img0.png": RED, "img1.png": GREEN}, {"images": ["b/9.png", "b/1.png"]}, ["red", "green"]),
        ({"PNG": RED}, {"image": None}, ["red"]),
    ],
)
def test_the_json_decides_which_pictures_and_in_which_order(
    tmp_path: Path, members: dict[str, bytes], content: dict[str, Any], colours: list[str]
) -> None:
    named = [(f"0.{name}", data) for name, data in members.items()]
    told = json.dumps({"question": "What?", "answer": "This.", **content})
    (sample,), rejects = build_tar(tmp_path, *named, ("0.json", told))
    assert rejects == [] and colours_of(sample) == colours


@pytest.mark.parametrize(
    ("members", "content", "says"),
    [
        ({}, {"image": "a.jpg", "text": "A square"}, "its json names 1 pictures (a.jpg) and it holds none"),
        ({"png": RED}, {"images": ["a.png", "b.png"]}, "its json names 2 pictures (a.png, b.png) and it holds png"),
        ({"a.png": RED, "b.png": BLUE}, {"images": ["a.png", "c.png"]}, "names 2 pictures (a.png, c.png)"),
        ({"seg.png": GREEN}, {"text": "A square"}, "its pictures are only seg.png; name them"),
    ],
)
def test_pictures_that_are_not_there_are_named(
    tmp_path: Path, members: dict[str, bytes], content: dict[str, Any], says: str
) -> None:
    told = json.dumps({"question": "What?", "answer": "This.", **content})
    samples, rejects = build_tar(tmp_path, *((f"0.{name}", data) for name, data in members.items()), ("0.json", told))
    assert samples == [] and len(rejects) == 1 and says in rejects[0]


def test_a_json_without_words_leaves_them_to_the_caption(tmp_path: Path) -> None:
    """img2dataset's metadata, with a caption of null or none."""
    meta = {"url": "https://a.org/0.jpg", "key": "0", "width": 56}
    members: list[Any] = []
    for number, more in enumerate(({"caption": None}, {}, {"caption": "of the json"})):
        words = ((f"{number}.txt", "of the text"), (f"{number}.json", json.dumps({**meta, **more})))
        members += [(f"{number}.png", RED), *words]
    samples, rejects = build_tar(tmp_path, *members)
    assert rejects == []
    assert [turns_of(sample)[1][1] for sample in samples] == ["of the text", "of the text", "of the json"]


def test_what_is_not_read_is_counted_and_named(tmp_path: Path) -> None:
    """In the manifest, in the report and in lint's notes, which are no faults."""
    extra = json.dumps({"caption": "A square", "similarity": 0.3, "image": None, "id": "x"})
    members = [("0.png", RED), ("0.json", extra), ("0.cls", "3"), ("1.png", RED), ("1.txt", "x"), ("1.seg.png", GREEN)]
    build_tar(tmp_path, *members)
    expected = {"field similarity": 1, "member .cls": 1, "member .seg.png": 1}
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["unread"] == expected
    for name in ("report.txt", "report.html"):
        assert all(part in (tmp_path / "set" / name).read_text() for part in expected)
    command = [sys.executable, "-m", "tools.lint_shards", str(tmp_path / "tars"), "--processes", "1"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout
    assert "note: the field similarity of 1 samples is not read" in shown.stdout
    assert "note: the member .cls of 1 samples is not read" in shown.stdout


def test_a_folder_passes_hidden_files_over_and_reads_every_suffix(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name, data in (
        ("a.jpg", coloured("red", "JPEG")),
        ("b.avif", coloured("green", "AVIF")),
        ("c.JFIF", coloured("blue", "JPEG")),
        ("._a.jpg", APPLE),
        (".cache/d.png", RED),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".txt").write_text("words")
    samples, rejects = build(tmp_path / "set", "--folder", folder)
    assert rejects == [] and [colours_of(sample) for sample in samples] == [["red"], ["green"], ["blue"]]


def test_a_broken_tar_gives_what_stands_before_the_fault(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [(f"{number}.json", TEXT) for number in range(3)]).read_bytes()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(whole[: 2 * 1024 + 700])
    samples, rejects = build(tmp_path / "set", "--webdataset", tmp_path / "tars")
    assert len(samples) == 2 and any("is broken or cut off" in reject for reject in rejects)
