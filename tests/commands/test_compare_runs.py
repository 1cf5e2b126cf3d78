"""Two runs are compared digit for digit, and the first difference is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.commands.compare_runs import main


def write(folder: Path, losses: list[float], keys: list[list[str]] | None = None, first: int = 1) -> str:
    folder.mkdir()
    steps: list[dict[str, Any]] = [
        {"step": step, "loss": loss, "grad_norm": 1.5, "consumed_samples": 8 * step}
        for step, loss in enumerate(losses, first)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    if keys is not None:
        lines = [{"step": step, "keys": names} for step, names in enumerate(keys, first)]
        (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_equal_runs_are_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write(tmp_path / "a", [3.25, 0.1]), write(tmp_path / "b", [3.25, 0.1, 0.05])
    assert main([one, other]) == 0
    assert "equal: 2 steps (1 to 2)" in capsys.readouterr().out


def test_the_last_digit_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write(tmp_path / "a", [3.25, 0.1]), write(tmp_path / "b", [3.25, 0.10000000000000002])
    assert main([one, other]) == 1
    assert "step 2 differs in loss: 0.1 and 0.10000000000000002" in capsys.readouterr().out
    assert main([one, other, "--last-step", "1"]) == 0


def test_a_resumed_run_is_compared_from_where_it_resumed(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", [1.0, 2.0, 3.0]), write(tmp_path / "b", [2.0, 3.0], first=2)
    assert main([one, other]) == 0


def test_the_order_of_samples_is_compared_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "a", [1.0, 2.0], [["x"], ["y"]])
    other = write(tmp_path / "b", [1.0, 2.0], [["x"], ["z"]])
    assert main([one, other]) == 0
    assert main([one, other, "--order"]) == 1
    assert "step 2 differs in keys" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["missing", "broken", "apart", "short", "hole"])
def test_what_cannot_be_compared_gets_a_sentence(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "a", [1.0, 2.0, 3.0])
    other = write(tmp_path / "b", [1.0, 2.0, 3.0], first=9 if fault == "apart" else 1)
    metrics = tmp_path / "b" / "metrics.jsonl"
    if fault == "missing":
        metrics.unlink()
    elif fault == "broken":
        metrics.write_text(metrics.read_text()[:-10])
    elif fault == "hole":
        lines = metrics.read_text().splitlines(keepends=True)
        metrics.write_text(lines[0] + lines[2])
    assert main([one, other, *(["--last-step", "7"] if fault == "short" else [])]) == 2
    assert capsys.readouterr().err.startswith("error: ")
