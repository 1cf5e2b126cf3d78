"""One table of all models of a report directory beside the paper's rows: report.json, report.md, report.html."""

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron_nvlm
from megatron_nvlm.evaluation.benchmarks.paper_results import OTHER_SPLITS, PAPER, PAPER_TASKS, SOURCE
from megatron_nvlm.evaluation.benchmarks.report_dir import read_json, write_json
from megatron_nvlm.evaluation.benchmarks.scoring import score_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1340px; padding: 0 1em; color: #222; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
td, th { padding: .3em .8em; border: 1px solid #ddd; text-align: right; white-space: nowrap; }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left; }
.ours { background: #eef6ff; font-weight: 600; } .paper { color: #555; } .none { color: #b7791f; font-weight: 400; }
pre { background: #fafafa; border: 1px solid #ddd; padding: .6em; white-space: pre-wrap; }
"""


def gather(report: Path) -> dict[str, Any]:
    """All models and tasks of a report directory, and the paper's numbers."""
    models: list[dict[str, Any]] = []
    tasks: dict[str, dict[str, Any]] = {}
    for described in sorted(report.glob("*/model.json")):
        model = read_json(described)
        models.append({key: model[key] for key in ("name", "kind", "path", "variant", "step")})
        for path in sorted(described.parent.glob("*.result.json")):
            result = read_json(path)
            task = result.pop("task")
            tasks.setdefault(task["name"], {**task, "results": {}})["results"][model["name"]] = result
    order = [*(name for name in PAPER_TASKS if name in tasks), *sorted(tasks.keys() - set(PAPER_TASKS))]
    return {
        "version": megatron_nvlm.__version__,
        "models": models,
        "tasks": [tasks[name] for name in order],
        "paper": {"source": SOURCE, "scores": PAPER, "other_splits": {k: list(v) for k, v in OTHER_SPLITS.items()}},
    }


def write_report(report: Path) -> list[Path]:
    """Write the table in its three forms; returns their paths."""
    content = gather(report)
    paths = [report / f"report.{form}" for form in ("json", "md", "html")]
    write_json(paths[0], content)
    paths[1].write_text(to_markdown(content))
    paths[2].write_text(to_html(content))
    return paths


Row = tuple[str, str, Sequence[str], Sequence[str]]
"""Task, scorer, cells of our models, cells of the paper's."""


def table_rows(content: Mapping[str, Any]) -> Iterator[Row]:
    """A row for each scorer; the paper's numbers stand beside a task's first."""
    names = [model["name"] for model in content["models"]]
    for task in content["tasks"]:
        for place, scorer in enumerate(task["scorers"]):
            own = [_cell(task["results"].get(name), scorer) for name in names]
            paper = [_number(row[task["name"]]) if task["name"] in row and place == 0 else "" for row in PAPER.values()]
            yield task["name"], scorer, own, paper


def _cell(result: Mapping[str, Any] | None, scorer: str) -> str:
    if result is None:
        return "not asked"
    if "not_run" in result:
        return "not run"
    return score_text(result["scores"][scorer]) if scorer in result["scores"] else "not asked"


def _number(value: float) -> str:
    return f"{value:.0f}" if value > 100 else f"{value:.1f}"


def _notes(content: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Of each task, what a reader of its numbers must know."""
    for task in content["tasks"]:
        results = task["results"]
        told = [
            f"{task['split']}. {task['few_shot']} examples before the question; greedy answers of at most "
            f"{task['max_new_tokens']} tokens; scores from 0 to {task['scale']:g}. {task['note']}".strip()
        ]
        for name, result in results.items():
            if "not_run" in result:
                told.append(f"{name}: not run: {result['not_run']}")
            elif result["unanswered"]:
                told.append(f"{name}: {result['unanswered']} of {result['samples']} have no answer and count as wrong")
            else:
                told.append(f"{name}: {result['samples']} samples, version {result['version']}")
            reasons = {one["not_scored"] for one in result.get("scores", {}).values() if "not_scored" in one}
            told += [f"{name}: answered and not scored; {reason}" for reason in sorted(reasons)]
        if len({result["asked"]["questions"] for result in results.values() if "asked" in result}) > 1:
            told.append(
                "The models were asked different questions (data or prompts differ), so do not compare their numbers."
            )
        yield task["name"], told


def _model_text(model: Mapping[str, Any]) -> str:
    step = f", step {model['step']}" if model["step"] is not None else ""
    kind = {"run": "run directory, by Megatron", "folder": "exported folder, by transformers"}[model["kind"]]
    return f"{model['name']}: NVLM-{model['variant'].upper()}{step}, {kind}, {model['path']}"


def _paper_text() -> list[str]:
    told = [f"{SOURCE}. The paper's scores stand beside the scorer of the release; MMMU of validation, AI2D of test."]
    for name, values in OTHER_SPLITS.items():
        each = ", ".join(f"{model} {value}" for model, value in zip(PAPER, values, strict=True))
        told.append(f"{name}: {each}.")
    return told


def to_markdown(content: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    names = [model["name"] for model in content["models"]]
    lines = ["# Benchmarks", "", *(f"- {_model_text(model)}" for model in content["models"]), ""]
    lines.append("| " + " | ".join(["task", "scorer", *names, *PAPER]) + " |")
    lines.append("|---|---|" + "---:|" * (len(names) + len(PAPER)))
    lines += [
        "| " + " | ".join([task, scorer, *own, *paper]) + " |" for task, scorer, own, paper in table_rows(content)
    ]
    lines += ["", "Mean and standard error over samples. " + " ".join(_paper_text()), ""]
    for task, told in _notes(content):
        lines += [f"## {task}", "", *(f"- {sentence}" for sentence in told), ""]
    return "\n".join(lines)


def to_html(content: Mapping[str, Any]) -> str:
    """The table as a page that loads nothing."""
    names = [model["name"] for model in content["models"]]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["task", "scorer", *names, *PAPER])
    rows = []
    for task, scorer, own, paper in table_rows(content):
        cells = "".join(f'<td class="{"ours" if "±" in cell else "none"}">{html.escape(cell)}</td>' for cell in own)
        cells += "".join(f'<td class="paper">{cell}</td>' for cell in paper)
        rows.append(f"<tr><td>{html.escape(task)}</td><td>{html.escape(scorer)}</td>{cells}</tr>")
    prompts = {task["name"]: task["prompt"] for task in content["tasks"]}
    notes = "".join(
        f"<h2>{html.escape(task)}</h2><ul>{_items(told)}</ul><pre>{html.escape(prompts[task])}</pre>"
        for task, told in _notes(content)
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Benchmarks</title>
<style>{STYLE}</style></head><body>
<h1>Benchmarks</h1>
<ul>{_items([_model_text(model) for model in content["models"]])}</ul>
<div class="wide"><table><tr>{head}</tr>
{"".join(rows)}</table></div>
<p>Mean and standard error over samples. {html.escape(" ".join(_paper_text()))}</p>
{notes}
</body></html>
"""


def _items(sentences: Sequence[str]) -> str:
    return "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
