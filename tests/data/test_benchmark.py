"""The loader's benchmark runs; what it measures is no test's business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import REPOSITORY, environment


@pytest.mark.slow
def test_every_form_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    command = [sys.executable, "-m", "benchmarks.loader", "--samples", "12", "--seconds", "0.3", "--out", str(out)]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(out.read_text())
    forms = {(row["form"], row["workers"]) for row in numbers["results"]}
    assert {("bare decode", 0), ("ours", 0), ("ours", 1), ("ours", 2), ("webdataset", 2)} <= forms
    assert all(row["tiles_per_second"] > 0 for row in numbers["results"])
