"""Runs side by side: charts over steps, samples, tokens or hours, and one self-contained page."""

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any

from megatron_nvlm.dotted_keys import dotted_keys, in_words
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.watching.charts import COLOURS, DASHES, Chart, Line, tick_label, to_svg
from megatron_nvlm.watching.history import History, present
from megatron_nvlm.watching.page import duration, rates_of
from megatron_nvlm.watching.run_state import read_config, read_state

AXES = {"step": "step", "samples": "samples", "tokens": "tokens", "hours": "hours of training"}
"""What charts can be drawn over, and its name on them."""
MOST_KEYS = 60
"""Keys of run files that a page lists."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1340px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(520px, 1fr)); gap: 1em; }
svg { background: #fafafa; border: 1px solid #ddd; width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .3em .9em; border: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child, .keys td { text-align: left; } .keys td { font-family: monospace; }
.colour { display: inline-block; width: 1.6em; height: .35em; margin-right: .5em; vertical-align: middle; }
"""


@dataclass(frozen=True)
class ComparedRun:
    """One run among others."""

    name: str
    colour: str
    history: History
    config: Mapping[str, Any]
    state: str


def open_runs(run_dirs: Sequence[RunDir]) -> list[ComparedRun]:
    """Read runs; each gets a colour, and the shortest name that no other one has."""
    runs = []
    for place, (run_dir, name) in enumerate(zip(run_dirs, _short_names(run_dirs), strict=True)):
        history, config = History(run_dir), read_config(run_dir)
        history.refresh()
        state = read_state(run_dir, config, history.steps[-1] if len(history) else 0)
        runs.append(ComparedRun(name, COLOURS[place % len(COLOURS)], history, config, str(state.kind)))
    return runs


def _short_names(run_dirs: Sequence[RunDir]) -> list[str]:
    """Ends of the paths, as long as it takes to tell them apart."""
    parts = [run_dir.path.resolve().parts for run_dir in run_dirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run_dir) for run_dir in run_dirs]


def places_of(history: History, axis: str) -> Sequence[float]:
    """Where each step of a run lies on an axis of `AXES`."""
    if axis == "samples":
        return history.column("consumed_samples")
    if axis == "step":
        return history.steps
    values = history.column("tokens" if axis == "tokens" else "seconds")
    sums = accumulate(value if math.isfinite(value) else 0.0 for value in values)
    return [value / (3600 if axis == "hours" else 1) for value in sums]


def smoothed(values: Sequence[float], steps: int) -> Sequence[float]:
    """Means of each step and those before it, `steps` in all; gaps stay."""
    if steps <= 1:
        return values
    found = []
    for index, value in enumerate(values):
        near = present(values[max(0, index - steps + 1) : index + 1])
        found.append(sum(near) / len(near) if math.isfinite(value) else math.nan)
    return found


def make_charts(runs: Sequence[ComparedRun], axis: str, smooth_steps: int) -> list[Chart]:
    """The charts of a comparison; what no run has is left out."""

    def chart(
        title: str, values_of: Callable[[History], Sequence[float]], steps: int, from_zero: bool = False
    ) -> Chart:
        lines = []
        for run in runs:
            values = values_of(run.history)
            kept = [(x, y) for x, y in zip(places_of(run.history, axis), values, strict=True) if math.isfinite(x)]
            lines.append(Line(run.name, [x for x, _ in kept], smoothed([y for _, y in kept], steps), run.colour))
        return Chart(title, AXES[axis], tuple(lines), from_zero)

    def of(name: str) -> Callable[[History], Sequence[float]]:
        return lambda history: history.column(name)

    charts = [
        chart("training loss (nats a target token)", of("loss"), smooth_steps),
        chart("gradient norm", of("grad_norm"), smooth_steps),
        chart("learning rate", of("learning_rate"), 1, from_zero=True),
    ]
    for name in ("samples", "tokens", "tiles"):
        charts.append(chart(f"{name} a second", partial(rates_of, name=name), smooth_steps, from_zero=True))
    for title, name in (
        ("model TFLOP a second on a rank", "tflops_per_rank"),
        ("MFU", "mfu"),
        ("share of a step that waits for data", "data_wait_share"),
    ):
        charts.append(chart(title, of(name), smooth_steps, from_zero=True))
    charts.append(_gates(runs, axis))
    names = sorted({name for run in runs for name in run.history.names})
    for name in names:
        if name.startswith("sources/") and name.endswith("/loss"):
            charts.append(chart(f"training loss: {name[len('sources/') : -len('/loss')]}", of(name), smooth_steps))
    for name in names:
        if name.startswith("validation/") and name.rsplit("/", 1)[-1] in ("loss", "token_accuracy"):
            charts.append(_validation(runs, axis, name))
    return [drawn for drawn in charts if not drawn.is_empty]


def _gates(runs: Sequence[ComparedRun], axis: str) -> Chart:
    """All gates of all runs: a colour for a run, dashes for a layer."""
    lines = []
    for run in runs:
        names = run.history.gates
        for place, name in enumerate(names):
            label = f"{run.name}, {name.removeprefix('gates/').replace('_', ' ')}"
            xs, ys = places_of(run.history, axis), run.history.column(name)
            lines.append(Line(label, xs, ys, run.colour, DASHES[place % len(DASHES)]))
    return Chart("tanh(gate) of the cross-attention layers", AXES[axis], tuple(lines), from_zero=True)


def _validation(runs: Sequence[ComparedRun], axis: str, name: str) -> Chart:
    """A metric of a validation set, measured after a few steps only: points that are joined."""
    lines = []
    for run in runs:
        pairs = zip(places_of(run.history, axis), run.history.column(name), strict=True)
        known = [pair for pair in pairs if math.isfinite(pair[1])]
        lines.append(Line(run.name, [x for x, _ in known], [y for _, y in known], run.colour))
    what = "validation loss" if name.endswith("/loss") else "validation, share of tokens right"
    return Chart(f"{what}: {name.split('/', 1)[1].rsplit('/', 1)[0]}", AXES[axis], tuple(lines))


def draw_page(runs: Sequence[ComparedRun], charts: Sequence[Chart]) -> str:
    """A page that needs no other file and no network."""
    names = ", ".join(html.escape(run.name) for run in runs)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Runs: {names}</title>
<style>{STYLE}</style></head><body>
<h1>{len(runs)} {"run" if len(runs) == 1 else "runs"}</h1>
{_table(runs)}
<h2>By {charts[0].x_name}</h2>
<div class="charts">{"".join(map(to_svg, charts))}</div>
{"".join(_changed_keys(runs))}
</body></html>
"""


def _table(runs: Sequence[ComparedRun]) -> str:
    heads = ("run", "state", "steps", "last loss", "lowest loss", "seconds a step", "tokens a second", "trained")
    rows = []
    for run in runs:
        history = run.history
        seconds, losses = present(history.column("seconds")), present(history.column("loss"))
        whole = sum(seconds)
        cells = (
            f'<span class="colour" style="background:{run.colour}"></span>{html.escape(run.name)}',
            run.state,
            str(history.steps[-1]) if len(history) else "0",
            f"{losses[-1]:.4f}" if losses else "",
            f"{min(losses):.4f}" if losses else "",
            f"{median(seconds):.3f}" if seconds else "",
            tick_label(round(history.total("tokens") / whole)) if whole else "",
            duration(whole),
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _changed_keys(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """The keys in which the run files differ."""
    flat = [{key: in_words(value) for key, value in dotted_keys(run.config)} for run in runs]
    keys = sorted({key for values in flat for key in values if key != "run_dir" and not key.startswith("logging.")})
    different = [key for key in keys if len({values.get(key, "") for values in flat}) > 1]
    if not different:
        return
    yield "<h2>Keys in which the run files differ</h2>"
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    yield f'<table class="keys"><tr><th>key</th>{head}</tr>'
    for key in different[:MOST_KEYS]:
        cells = "".join(f"<td>{html.escape(values.get(key, ''))}</td>" for values in flat)
        yield f"<tr><td>{html.escape(key)}</td>{cells}</tr>"
    yield "</table>"
    if len(different) > MOST_KEYS:
        yield f"<p>and {len(different) - MOST_KEYS} more</p>"
