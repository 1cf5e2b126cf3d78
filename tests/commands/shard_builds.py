"""Material of every form and the command that builds it, for the tests of build_shards."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.commands.build_shards import main
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from tests.support.shards import picture

SIZES = ((168, 112), (50, 200), (56, 56), (300, 60))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    qwen2_tokenizer(1024).save(str(path))
    return path


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """A JSON lines file of every form, with its images."""
    images = tmp_path / "images"
    images.mkdir()
    for number, size in enumerate(SIZES * 3):
        (images / f"{number}.png").write_bytes(picture(*size, seed=number))
    (images / "ünïcode name.jpg").write_bytes(picture(90, 40, "JPEG"))

    def human(text: str) -> dict[str, str]:
        return {"from": "human", "value": text}

    lines: list[dict[str, Any]] = [
        {"id": "a/b.c", "image": "0.png", "conversations": [human("<image>\nWhat?"), {"from": "gpt", "value": "A."}]},
        {"image": ["1.png", "2.png"], "conversations": [human("<image>, <image>?"), {"from": "gpt", "value": "Two."}]},
        {"image": "3.png", "caption": "A long picture"},
        {"image": "4.png", "question": "How many?", "answer": ["two", "three", "three"]},
        {"question": "What is 2 + 2?", "answer": "4"},
        {"text": "Only words."},
        {
            "images": ["5.png"],
            "messages": [{"role": "user", "content": "See"}, {"role": "assistant", "content": "Yes"}],
        },
        {
            "image": "ünïcode name.jpg",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "This"}, {"type": "image"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
            ],
        },
    ]
    lines += [{"image": f"{number}.png", "caption": f"Number {number}"} for number in range(6, 12)] * 3
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "data.jsonl").write_text(text)
    return tmp_path


def build(material: Path, out: str, *more: str, source: tuple[str, ...] | None = None) -> Path:
    folder = material / out
    given = source or ("--jsonl", str(material / "data.jsonl"), "--images-dir", str(material / "images"))
    defaults = ("--tile-size", "56", "--samples-per-shard", "5", "--processes", "1", "--quiet")
    main(["--out", str(folder), *given, *defaults, *more])
    return folder


def files_of(folder: Path) -> dict[str, str]:
    """Hash of every file. The set's name stands in keys, so compared sets bear the same."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
