"""Folders that Megatron-Energon prepared: field maps, and which tars are for training."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_nvlm.commands.build_shards import main
from megatron_nvlm.data.building.forms import DEFAULT_CAPTION_PROMPT
from tests.data.building.builds import Member, build, coloured, colours_of, turns_of, write_tar

CAPTIONS = {"sample_type": {"__module__": "megatron.energon", "__class__": "CaptioningSample"}}
QUESTIONS = {"__module__": "megatron.energon", "__class__": "VQAWebdataset"}


def prepare(folder: Path, description: dict[str, Any], split: dict[str, Any] | None = None) -> Path:
    """What `energon prepare` leaves beside the tars."""
    meta = folder / ".nv-meta"
    meta.mkdir(parents=True)
    (meta / "dataset.yaml").write_text(yaml.safe_dump(description))
    if split is not None:
        (meta / "split.yaml").write_text(yaml.safe_dump(split))
    return folder


def captions(*fields: tuple[str, str]) -> dict[str, Any]:
    return {**CAPTIONS, "field_map": dict(fields)}


def picture_with(*others: Member, colour: str = "red") -> list[Member]:
    return [("a.jpg", coloured(colour, "JPEG")), *others]


@pytest.mark.parametrize(
    ("place", "other"),
    [
        ("txt", ("a.txt", "A red one.")),
        ("json[caption]", ("a.json", json.dumps({"caption": "A red one.", "text": "Another."}))),
        ("detail.json[all][1][en]", ("a.detail.json", json.dumps({"all": [{}, {"en": "A red one."}]}))),
        ("json[caption],txt", ("a.txt", "A red one.")),
    ],
)
def test_captions(tmp_path: Path, place: str, other: Member) -> None:
    folder = prepare(tmp_path / "set", captions(("image", "png,jpg"), ("caption", place)))
    write_tar(folder / "0.tar", picture_with(other, ("a.seg.png", coloured("blue"))))
    (sample,), rejects = build(tmp_path / "out", "--webdataset", folder)
    assert not rejects and colours_of(sample) == ["red"]
    assert turns_of(sample) == [("human", f"<image>\n{DEFAULT_CAPTION_PROMPT}"), ("gpt", "A red one.")]
    assert "a.seg.png" not in str(sample.record) and "seg.png" in (tmp_path / "out" / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ({"q": "Which?", "a": "red"}, "red"),
        ({"q": "Which?", "a": ["red", "blue", "blue"]}, "blue"),
        ({"q": "Which?", "a": ["red", "blue"], "w": [0.2, 0.8]}, "blue"),
    ],
)
def test_questions(tmp_path: Path, said: dict[str, Any], answer: str) -> None:
    fields = {"image": "jpg", "context": "json[q]", "answers": "json[a]"}
    if "w" in said:
        fields["answer_weights"] = "json[w]"
    folder = prepare(tmp_path / "set", {**QUESTIONS, "field_map": fields, "subflavors": {"a": 1}})
    write_tar(folder / "deep" / "0.tar", picture_with(("a.json", json.dumps(said))))
    (sample,), rejects = build(tmp_path / "out", "--webdataset", folder)
    assert not rejects and turns_of(sample) == [("human", "<image>\nWhich?"), ("gpt", answer)]


def test_text_alone(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "set", {"field_map": {"text": "txt"}})
    write_tar(folder / "0.tar", [("a.txt", "Words."), ("a.json", "{}")])
    (sample,), _ = build(tmp_path / "out", "--webdataset", folder)
    assert turns_of(sample) == [("gpt", "Words.")] and sample.record["images"] == []


def test_a_crude_dataset_is_read_as_any_tar(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "set", {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"})
    write_tar(folder / "0.tar", picture_with(("a.txt", "A red one.")))
    (sample,), rejects = build(tmp_path / "out", "--webdataset", folder)
    assert not rejects and turns_of(sample)[1] == ("gpt", "A red one.")


def test_tars_for_validation_are_left_out_and_counted(tmp_path: Path) -> None:
    split = {
        "split_parts": {"train": ["train/{0..1}.tar"], "val": ["val/2.tar"]},
        "exclude": ["train/1.tar"],
    }
    folder = prepare(tmp_path / "set", captions(("image", "jpg"), ("caption", "txt")), split)
    for name, colour in (("train/0", "red"), ("train/1", "green"), ("val/2", "blue"), ("other/3", "blue")):
        write_tar(folder / f"{name}.tar", picture_with(("a.txt", colour), colour=colour))
    samples, _ = build(tmp_path / "out", "--webdataset", folder)
    assert [colours_of(sample) for sample in samples] == [["red"]]
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    for part in ("val", "excluded", "no part"):
        assert f"tar of split part {part}" in manifest
    samples, _ = build(tmp_path / "all", "--webdataset", folder / "**" / "*.tar")
    assert len(samples) == 4  # a pattern reads members as they are, of all tars


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.jpg", "no picture"), ("a.txt", "x")], "image"),
        ([("a.txt", "x")], "it has no jpg, which its field_map names as image; it has txt"),
        ([("a.jpg", coloured("red", "JPEG"))], "it has no txt, which its field_map names as caption; it has jpg"),
    ],
)
def test_samples_without_a_field_are_rejected(tmp_path: Path, members: list[Member], words: str) -> None:
    folder = prepare(tmp_path / "set", captions(("image", "jpg"), ("caption", "txt")))
    write_tar(folder / "0.tar", members)
    samples, (reject,) = build(tmp_path / "out", "--webdataset", folder)
    assert not samples and words in reject


@pytest.mark.parametrize(
    ("fields", "members", "words"),
    [
        ({"image": "txt", "caption": "txt"}, [("a.txt", "x")], "names txt as image, which is no picture"),
        ({"image": "jpg", "caption": "jpg"}, [("a.jpg", coloured("red"))], "names a picture, jpg, as caption"),
        ({"text": "npy"}, [("a.npy", "x")], "its member npy is neither a picture, a .txt nor a .json"),
        ({"text": "json[a][x]"}, [("a.json", '{"a": [1]}')], "it has no json[a][x]"),
        ({"text": "json"}, [("a.json", "{")], "its JSON is broken"),
        (
            {"context": "txt", "answers": "json[a]", "answer_weights": "json[w]"},
            [("a.txt", "x"), ("a.json", '{"a": ["x"], "w": [1, 2]}')],
            "no lists of one length",
        ),
    ],
)
def test_values_that_a_field_cannot_have(
    tmp_path: Path, fields: dict[str, str], members: list[Member], words: str
) -> None:
    folder = prepare(tmp_path / "set", {"field_map": fields})
    write_tar(folder / "0.tar", members)
    samples, (reject,) = build(tmp_path / "out", "--webdataset", folder)
    assert not samples and words in reject


@pytest.mark.parametrize(
    ("description", "split", "words"),
    [
        ({"sample_loader": "sample_loader.py:load"}, None, "names a sample_loader, Python that no build runs"),
        ({"field_map": {"words_boxes": "json"}}, None, "its field_map has 'words_boxes'; a build reads image"),
        ({"field_map": {"image": 3}}, None, "which is no member such as jpg"),
        ({"field_map": {"image": "json[a"}}, None, "which is no member such as jpg"),
        ({"field_map": []}, None, "its field_map is no object"),
        ({"crystal": 1}, None, "has 'crystal', which no build follows"),
        ({"field_map": {"text": "txt"}}, {"split_parts": 3}, "has no 'split_parts'"),
        ({"field_map": {"text": "txt"}}, {"split_parts": {"val": ["0.tar"]}}, "has no tar of part train"),
        ({"field_map": {"text": "txt"}}, {"split_parts": {"train": ["0.tar", "1.tar"]}}, "1.tar, which"),
        (
            {"field_map": {"text": "txt"}},
            {"split_parts": {"train": ["0.tar"]}, "exclude": ["0.tar/a"]},
            "excludes the sample 0.tar/a",
        ),
    ],
)
def test_what_cannot_be_followed_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    description: dict[str, Any],
    split: dict[str, Any] | None,
    words: str,
) -> None:
    folder = prepare(tmp_path / "set", description, split)
    write_tar(folder / "0.tar", [("a.txt", "x")])
    with pytest.raises(SystemExit):
        build(tmp_path / "out", "--webdataset", folder)
    assert words in capsys.readouterr().err


def test_another_field_map_is_another_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare(tmp_path / "set", {"field_map": {"text": "txt"}})
    write_tar(folder / "0.tar", [("a.txt", "Words."), ("a.json", '{"b": "Others."}')])
    build(tmp_path / "out", "--webdataset", folder)
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump({"field_map": {"text": "json[b]"}}))
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "out"), "--webdataset", str(folder), "--images", "whole", "--quiet"])
    assert "error: " in capsys.readouterr().err
    samples, _ = build(tmp_path / "again", "--webdataset", folder)
    assert turns_of(samples[0]) == [("gpt", "Others.")]
