"""The model card of an export: what a run directory and a benchmark report know, and nothing of this machine's paths."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_nvlm.checkpoint.integrity import IDENTITY_FILE
from megatron_nvlm.config.load import load_run
from megatron_nvlm.errors import UserError
from megatron_nvlm.runs.model_card import read_scores, step_of, write_card

SETS = ("data.train.0.path=/secret/place/charts", "data.train.0.weight=3", "data.train.1.path=/secret/place/chat|text")


def make_run(folder: Path, step: int | None = 20) -> Path:
    """A run directory as far as a card reads it; returns its checkpoint."""
    checkpoint = folder / "run" / "checkpoints" / "step_00000020"
    checkpoint.mkdir(parents=True)
    progress = {} if step is None else {"progress": {"step": step, "consumed_samples": 8}}
    (checkpoint / IDENTITY_FILE).write_text(json.dumps(progress))
    rows = [
        {"step": at, "validation": {"charts/images": {"loss": 3.0 - at / 20, "token_accuracy": 0.5, "samples": 7}}}
        for at in (10, 20, 30)
    ]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3')
    return checkpoint


def make_report(folder: Path, **changes: Any) -> Path:
    result = {
        "samples": 4,
        "unanswered": 1,
        "version": "0.1.0",
        "scores": {"exact": {"score": 75.0, "error": 25.0}, "python_tests": {"not_scored": "no"}},
    }
    task = {"name": "ai2d", "kind": "vision-language", "few_shot": 0, "prompt": "{question}\nA|B"}
    model = {"name": "ours", "path": str(folder / "run"), "step": 20, **changes}
    other = {"name": "other", "path": "elsewhere", "step": 20}
    report = {"models": [other, model], "tasks": [{**task, "results": {"ours": result, "other": {"not_run": "put"}}}]}
    (folder / "report.json").write_text(json.dumps(report))
    return folder / "report.json"


def test_a_card_tells_data_validation_and_scores(tmp_path: Path) -> None:
    checkpoint = make_run(tmp_path)
    run = load_run("demo_h", SETS)
    text = write_card(run, checkpoint, read_scores(make_report(tmp_path), checkpoint, 20))
    _, head, body = text.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == "transformers" and metadata["tags"] == ["nvlm", "nvlm-h", "custom_code"]
    assert metadata["model-index"] == [
        {
            "name": "NVLM-H",
            "results": [
                {
                    "task": {"type": "image-text-to-text"},
                    "dataset": {"name": "ai2d", "type": "ai2d"},
                    "metrics": [{"type": "exact", "value": 75.0}],
                }
            ],
        }
    ]
    assert "20 steps of 32 samples, recipe sft" in body
    assert "| charts | 3 | 96.8% |" in body and "| chat\\|text | 0.1 | 3.2% |" in body and "/secret" not in text
    assert "After step 20:" in body and "| charts/images | 2.0000 | 50.0% | 7 |" in body
    assert "| ai2d | exact | 75.0 ± 25.0 | 4 | 0 | {question}<br>A\\|B |" in body
    assert "| ai2d | python_tests | not scored |" in body and "1 questions had no answer and count as wrong." in body


def test_a_card_without_training_or_report_says_less(tmp_path: Path) -> None:
    checkpoint = make_run(tmp_path, None)
    text = write_card(load_run("demo_x", SETS), checkpoint, ())
    assert step_of(checkpoint) == 0 and "imported and not trained here" in text
    assert "Benchmarks" not in text and "Validation" not in text and "model-index" not in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"step": 10}, "has no scores of .*run at step 20, but of elsewhere at step 20, .*run at step 10; run its"),
        ({"path": "moved"}, "but of elsewhere at step 20, moved at step 20"),
        ({"name": "other"}, "has no scores of"),
    ],
)
def test_scores_of_another_model_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    checkpoint = make_run(tmp_path)
    with pytest.raises(UserError, match=sentence):
        read_scores(make_report(tmp_path, **changes), checkpoint, 20)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"models": [{}], "tasks": []}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    checkpoint = make_run(tmp_path)
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(UserError, match="other.json is no report.json of run_benchmarks"):
        read_scores(tmp_path / "other.json", checkpoint, 20)
