"""The demo from beginning to end at the size of a test: shards, training, evaluation, report; and started once more."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nvlm.demo import data as demo_data
from megatron_nvlm.demo.report import draw_metrics
from tests.support.launch import environment

STEPS = 6


def run_demo(folder: Path, variant: str) -> str:
    short = [f"training.train_steps={STEPS}", "optimizer.warmup_steps=2", "checkpoint.save_every_steps=4"]
    command = [
        sys.executable,
        "-m",
        "megatron_nvlm.demo.run",
        "--variant",
        variant,
        "--sizes",
        "64",
        "16",
        "6",
        "--",
        *short,
    ]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("variant", [*(pytest.param(other, marks=pytest.mark.slow) for other in "dx"), "h"])
def test_the_demo_ends_with_a_report(tmp_path: Path, variant: str) -> None:
    run_dir = tmp_path / "runs" / f"demo_{variant}"
    printed = run_demo(tmp_path, variant)
    assert f"open {run_dir / 'report.html'}" in printed
    page = (run_dir / "report.html").read_text()
    assert page.count("<svg") == (1 if variant == "d" else 2)  # D has no gates
    assert page.count('class="example ') == 6
    assert "&lt;tile_1&gt;" in page and "data:image/jpeg;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the page is to be self-contained"
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert len(evaluation["answers"]) == 3 * 6
    metrics = (run_dir / "metrics.jsonl").read_text()
    assert metrics.count("\n") == STEPS

    if variant == "h":  # a finished run is not trained again
        run_demo(tmp_path, variant)
        assert (run_dir / "metrics.jsonl").read_text() == metrics


def test_validation_losses_are_drawn_where_all_validations_have_them() -> None:
    rows = [{"step": step, "loss": 1.0, "gates": {}} for step in (1, 2, 3)]
    assert "validation loss" not in draw_metrics(rows)
    rows[0]["validation"] = {"a/text": {"loss": 2.0}, "a/images": {"loss": None}}
    rows[2]["validation"] = {"a/text": {"loss": 1.0}, "b/text": {"loss": 1.0}}
    page = draw_metrics(rows)
    assert "validation loss" in page and "a/text" in page
    assert "a/images" not in page and "b/text" not in page


def test_training_and_held_out_images_share_no_source_item() -> None:
    training, heldout = demo_data.load_sources(False), demo_data.load_sources(True)
    assert not set(training.letter_pairs) & set(heldout.letter_pairs)
    scans = [{scan.tobytes() for scans in sources.digits.values() for scan in scans} for sources in (training, heldout)]
    assert scans[0] and scans[1] and len(scans[0] & scans[1]) <= 2  # two scans of the source may be alike


def test_the_same_seed_gives_the_same_shards(tmp_path: Path) -> None:
    for name in ("one", "two"):
        demo_data.build(tmp_path / name, 12, 4, 4)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) > 9
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
