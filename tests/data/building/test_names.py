"""Other names of fields, roles and placeholder: settings of a build, part of what it is."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.commands.build_shards import main
from tests.data.building.builds import build, coloured, colours_of, turns_of, write_tar

LINE: dict[str, Any] = {
    "picture_path": "red.png",
    "dialogue": [
        {"speaker": "questioner", "utterance": "Here <picture>, what?"},
        {"speaker": "answerer", "utterance": "Red."},
    ],
}
OPTIONS = (
    *("--field", "image=picture_path", "--field", "conversations=dialogue", "--field", "from=speaker"),
    *("--field", "value=utterance", "--role", "user=questioner", "--role", "assistant=answerer"),
    *("--placeholder", "<picture>"),
)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(coloured("red"))
    (tmp_path / "data.jsonl").write_text(json.dumps(LINE) + "\n")
    return tmp_path / "data.jsonl"


@pytest.mark.parametrize("kind", ["jsonl", "webdataset"])
def test_a_sample_under_other_names(lines: Path, tmp_path: Path, kind: str) -> None:
    source = lines
    if kind == "webdataset":
        source = write_tar(tmp_path / "0.tar", [("0.red.png", coloured("red")), ("0.json", json.dumps(LINE))])
    (sample,), rejects = build(tmp_path / "set", f"--{kind}", source, *OPTIONS)
    assert rejects == [] and colours_of(sample) == ["red"]
    assert turns_of(sample) == [("human", "Here <image>, what?"), ("gpt", "Red.")]


def test_they_decide_what_a_build_is(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "set", "--jsonl", lines, *OPTIONS)
    told = json.loads((tmp_path / "set" / "manifest.json").read_text())["plan"]["settings"]["sample"]["names"]
    assert told["placeholder"] == "<picture>" and told["roles"]["user"] == "questioner" and len(told["fields"]) == 4
    before = (tmp_path / "set" / "shard-000000.tar").read_bytes()
    build(tmp_path / "set", "--jsonl", lines, *OPTIONS[2:], *OPTIONS[:2])  # the same in another order
    assert (tmp_path / "set" / "shard-000000.tar").read_bytes() == before
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "set"), "--jsonl", str(lines), *OPTIONS, "--role", "system=narrator"])
    assert "with other settings" in capsys.readouterr().err


def test_a_build_without_them_is_described_as_before(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "Words."}\n')
    build(tmp_path / "set", "--jsonl", tmp_path / "data.jsonl")
    assert "names" not in json.loads((tmp_path / "set" / "manifest.json").read_text())["plan"]["settings"]["sample"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--field", "picture=a"), "'picture' is no known name; choose one of answer, answers, caption"),
        (("--role", "human=a"), "'human' is no known name; choose one of system, user, assistant"),
        (("--field", "image"), "is not NAME=THEIRS"),
        (("--field", "image="), "is not NAME=THEIRS"),
        (("--field", "image=a", "--field", "image=b"), "twice; leave one out"),
        (("--field", "image=a", "--field", "images=a"), "twice; leave one out"),
        (("--placeholder", " "), "--placeholder is empty"),
    ],
)
def test_wrong_names_are_one_sentence(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], says: str
) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "set"), "--jsonl", str(lines), *options])
    assert says in capsys.readouterr().err and not (tmp_path / "set").exists()


def test_a_field_under_both_names_is_a_reject(lines: Path, tmp_path: Path) -> None:
    lines.write_text(json.dumps({**LINE, "image": "blue.png"}) + "\n")
    samples, (reject,) = build(tmp_path / "set", "--jsonl", lines, *OPTIONS)
    assert samples == [] and "it has both 'picture_path', which --field image=picture_path names, and 'image'" in reject
