"""One JSON array is read like JSON lines, whatever stands between its entries; a broken one is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nvlm.data.building.inputs import JsonArray, JsonLines, open_json
from tests.data.building.builds import build, coloured, colours_of, turns_of

ENTRIES: list[dict[str, Any]] = [
    {
        "image": "red.png",
        "conversations": [{"from": "human", "value": "Wie heißt das?"}, {"from": "gpt", "value": "赤"}],
    },
    {"question": "What is 1 + 1?", "answer": "2"},
    {"image": "blue.png", "caption": "blue"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(coloured(colour))
    return tmp_path


@pytest.mark.parametrize("form", ["pretty", "one line", "marked", "spaced"])
def test_an_array_gives_the_samples_of_its_lines(folder: Path, form: str) -> None:
    path = folder / "data.json"
    text = json.dumps(ENTRIES, ensure_ascii=False, indent=2 if form == "pretty" else None)
    path.write_text({"marked": "\ufeff" + text, "spaced": f"\n \n{text}\n\n"}.get(form, text), encoding="utf-8")
    (folder / "lines.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    samples, rejects = build(folder / "set", "--jsonl", path)
    expected, _ = build(folder / "expected", "--jsonl", folder / "lines.jsonl")
    assert rejects == [] and [turns_of(one) for one in samples] == [turns_of(one) for one in expected]
    assert [colours_of(one) for one in samples] == [["red"], [], ["blue"]]


def test_an_entry_is_named_by_its_place(folder: Path) -> None:
    path = folder / "data.json"
    path.write_text(json.dumps([ENTRIES[0], {"image": "none.png", "caption": "x"}, 7], indent=1))
    samples, rejects = build(folder / "set", "--jsonl", path)
    assert len(samples) == 1 and "none.png cannot be read" in rejects[0] and rejects[1] == "its JSON is no object"
    places = [json.loads(line)["where"] for line in (folder / "set" / "rejects.jsonl").read_text().splitlines()]
    assert places == [f"{path} entry 2", f"{path} entry 3"]


@pytest.mark.parametrize(
    ("text", "kept", "fault"),
    [
        ('[{"text": "a"}, {"text": "b"', 1, "is broken after 1 entries"),
        ('[{"text": "a"}, ', 1, "has no end; it is cut off after 1 entries"),
        ('[{"text": "a"}]\n[{"text": "b"}]', 1, "more stands after the end"),
        ('[{"text": "a"}, {"text": "b"},]', 2, ""),
    ],
)
def test_a_broken_array_is_named(folder: Path, text: str, kept: int, fault: str) -> None:
    path = folder / "data.json"
    path.write_text(text)
    samples, rejects = build(folder / "set", "--jsonl", path)
    assert len(samples) == kept
    assert rejects == [] if not fault else fault in rejects[0]


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(
    st.lists(st.dictionaries(text, values, max_size=4), min_size=1, max_size=5),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
)
def test_places_of_entries_are_exact(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Any], indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("array") / "data.json"
    path.write_text(json.dumps(entries, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    opened = open_json(path, None)
    assert isinstance(opened, JsonArray) and opened.faults == [] and len(opened) == len(entries)
    assert [json.loads(opened._bytes_of(number)) for number in range(len(opened))] == entries


def test_lines_stay_lines(folder: Path) -> None:
    (folder / "lines.jsonl").write_text('{"text": "[a]"}\n')
    assert type(open_json(folder / "lines.jsonl", None)) is JsonLines
