"""Meta files of InternVL, and tars whose json is a list of turns, as Megatron-LM's multimodal example has them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.commands.build_shards import main
from tests.data.building.builds import build, build_tar, coloured, colours_of, turns_of

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]


def write_meta(folder: Path, **changed: Any) -> Path:
    for colour in ("red", "green"):
        (folder / colour).mkdir()
        (folder / colour / "a.png").write_bytes(coloured(colour))
        line = {"id": 0, "image": "a.png", "conversations": TALK}
        (folder / f"{colour}.jsonl").write_text(json.dumps(line) + "\n")
    meta = {
        colour: {
            "root": str(folder / colour),
            "annotation": str(folder / f"{colour}.jsonl"),
            "data_augment": False,
            "repeat_time": repeat,
            "length": 1,
            **changed,
        }
        for colour, repeat in (("red", 1), ("green", 3))
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


def test_a_meta_file_gives_its_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, rejects = build(tmp_path / "set", "--internvl-meta", write_meta(tmp_path))
    assert rejects == [] and [colours_of(sample) for sample in samples] == [["red"], ["green"]]
    said = capsys.readouterr().out
    assert "repeat_time 3 is not applied; without effect: data_augment, length" in said
    assert "give it as the weight in data.train of the run" in said


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"annotation": None}, "the set 'red' of"),
        ({"root": 3}, "has a 'root' that is no path"),
        ({"repeat_time": 0}, "has 'repeat_time' 0; it must be a number above 0"),
        ({"repeat_time": True}, "has 'repeat_time' True"),
        ({"conv_style": "x"}, "has 'conv_style', which no build follows"),
        ({"annotation": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
    ],
)
def test_a_wrong_meta_file_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], says: str
) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "set"), "--internvl-meta", str(write_meta(tmp_path, **changed))])
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"a": 3}'])
def test_what_is_no_meta_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "set"), "--internvl-meta", str(tmp_path / "meta.json")])
    assert "meta.json" in capsys.readouterr().err


def test_a_json_that_is_a_list_of_turns(tmp_path: Path) -> None:
    members = [("0.jpg", coloured("red", "JPEG")), ("0.json", json.dumps(TALK)), ("1.json", "[3]")]
    samples, rejects = build_tar(tmp_path, *members)
    assert [turns_of(one) for one in samples] == [[("human", "<image>\nWhat?"), ("gpt", "Red.")]]
    assert colours_of(samples[0]) == ["red"] and len(rejects) == 1 and "turn 0 of its conversation" in rejects[0]


@pytest.mark.parametrize(("kind", "says"), [("pipe", "is no file"), ("none", "cannot be read")])
def test_a_meta_file_that_cannot_be_read(
    tmp_path: Path, kind: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe would be waited for."""
    path = tmp_path / "meta.json"
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "set"), "--internvl-meta", str(path)])
    assert f"the meta file {path} {says}" in (said := capsys.readouterr().err) and "correct --internvl-meta" in said
