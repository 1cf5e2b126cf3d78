"""docs/data.md: every command of its bash blocks runs, in order, in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_nvlm.data.building.forms import FORMS
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.text.templates import TEMPLATES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    shown = ""
    assert len(BLOCKS) >= 7
    for block in BLOCKS:
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{block}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        shown += result.stdout
    assert len(ShardSet(tmp_path / "shards" / "again")) == len(ShardSet(tmp_path / "shards" / "images")) > 50
    assert len(ShardSet(tmp_path / "shards" / "captioned")) == 3
    assert len(ShardSet(tmp_path / "shards" / "packed")) == len(ShardSet(tmp_path / "shards" / "text"))
    assert len(ShardSet(tmp_path / "shards" / "first")) == 40
    assert shown.count("no fault") == 2
    assert (
        Image.open(tmp_path / "sample.png").width == 1200 and "data:image/png" in (tmp_path / "sample.html").read_text()
    )
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line][-1] == 6


def test_tables_name_what_there_is() -> None:
    for name in TEMPLATES:
        assert f"| `{name}`" in PAGE
    for name, form in FORMS.items():
        assert f"| {name} |" in PAGE and all(f"`{field}`" in PAGE for field in form.fields)
