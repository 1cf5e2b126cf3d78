"""Demo material: the same bytes again, answers that fit, licences for everything, and what is not installed is said."""

import hashlib
import json
from pathlib import Path

import pytest

from megatron_nvlm.demo.material import SOURCES, make_material
from megatron_nvlm.errors import UserError

ALWAYS = {"pages", "charts", "digits", "photographs", "documentation"}
"""Sources whose packages are always there."""


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_material(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        made = {
            one.source.name: one for one in make_material(tmp_path / name, 0.005, 1, 512, root=tmp_path / "no_debian")
        }
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        hashes.append(
            [(path.relative_to(tmp_path / name), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
        )
    assert hashes[0] == hashes[1]
    assert ALWAYS <= {name for name, one in made.items() if one.items}
    for name in ("emoji", "flags", "definitions"):
        assert made[name].items == 0 and "is not installed" in made[name].note
    images, text = lines(tmp_path / "a" / "images.jsonl"), lines(tmp_path / "a" / "text.jsonl")
    assert all((tmp_path / "a" / "images" / line["image"]).is_file() for line in images)
    assert all(line["question"].strip() and line["answer"].strip() and line["licence"] for line in images + text)
    licences = {one["source"] for one in json.loads((tmp_path / "a" / "licences.json").read_text())}
    assert licences == {line["source"] for line in images + text}
    with pytest.raises(UserError, match="holds material already"):
        make_material(tmp_path / "a")


def test_every_source_names_its_licence() -> None:
    assert len({source.name for source in SOURCES}) == len(SOURCES)
    assert all(source.package and source.licence and source.origin for source in SOURCES)
