"""A pipe, a device or a folder in the place of a file is one sentence of every command that opens it, and no hang."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import environment

COMMANDS = {
    "tools.build_shards --out o --jsonl {pipe}": "is a pipe and no file",
    "tools.build_shards --out o --jsonl {pipe} --tokenizer hf": "is a folder and no file; name a file in it",
    "tools.build_shards --out o --webdataset {pipe.tar}": "is a pipe and no file",
    "tools.build_shards --out o --webdataset {device.tar}": "is a device and no file",
    "tools.build_shards --out o --webdataset tars": "x.tar is a pipe and no file",
    "tools.build_shards --out o --folder {pipe}": "there is no folder",
    "tools.lint_shards tars --tokenizer {pipe}": "is a pipe and no file",
    "tools.inspect_sample --shards tars --out a.png": "there is no index.json",
    "tools.dry_run --world-size 1 --config {pipe}": "is a pipe and no file",
    "tools.convert_checkpoint inspect hf": "there is no checkpoint in hf",
    "tools.convert_checkpoint tokenizer --out o.json {pipe.model}": "is a pipe and no file",
    "tools.convert_checkpoint tokenizer --out o.json {device.model}": "is a device and no file",
    "tools.convert_checkpoint import --variant d --out o --hf hf": "is a pipe and no file",
    "tools.score --hf hf --out o --inputs {pipe}": "is a pipe and no file",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder whose config.json is a pipe, a set whose index.json and tar are."""
    root = tmp_path_factory.mktemp("pipes")
    for name in ("hf/config.json", "tars/x.tar", "tars/index.json"):
        (root / name).parent.mkdir(exist_ok=True)
        os.mkfifo(root / name)
    (root / "hf" / "model.safetensors").write_bytes(b"")
    return root


@pytest.mark.parametrize("line", COMMANDS)
def test_one_sentence_and_no_hang(folder: Path, line: str) -> None:
    words = line.split()
    for place, word in enumerate(words):
        if word.startswith("{"):
            path = folder / word.strip("{}")
            words[place] = str(path)
            if path.is_symlink() or path.exists():
                continue
            if path.stem == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to("/dev/zero")
    ended = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60
    )
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2 and last.startswith("error: ") and COMMANDS[line] in last
