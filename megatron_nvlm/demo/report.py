"""One self-contained page about a demo run: `python -m megatron_nvlm.demo.report --run-dir DIR` writes DIR/report.html.

It shows the loss and the gates over the steps, how often held-out answers are right with and without the images, and
held-out images with their tiles and tags, question, answer and truth.
"""

import argparse
import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.config.load import load_run
from megatron_nvlm.data.shards.read import RawSample, ShardSet
from megatron_nvlm.image.tile_tags import tile_tags
from megatron_nvlm.image.tiling import Grid, TilingConfig
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.text.conversation import IMAGE_PLACEHOLDER, read_turns

EXAMPLES = 24
WIDTH, HEIGHT, MARGIN = 640, 260, 46
COLOURS = ("#1f6fb2", "#d1495b", "#2f855a", "#b7791f", "#6b46c1", "#555555")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
.curves { display: flex; flex-wrap: wrap; gap: 1em; }
svg { background: #fafafa; border: 1px solid #ddd; width: 520px; height: auto; }
table { border-collapse: collapse; } td, th { padding: .3em .9em; border: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 1em; }
.example { border: 1px solid #ddd; padding: .7em; }
.right { border-left: 5px solid #2f855a; } .wrong { border-left: 5px solid #d1495b; }
.tiles { display: grid; gap: 4px; width: max-content; } .tiles figure { margin: 0; text-align: center; }
.pictures { display: flex; gap: 24px; align-items: center; }
figcaption { font: 9px monospace; color: #555; overflow-wrap: anywhere; }
figure { width: 64px; } img { display: block; width: 64px; height: 64px; }
.small figure { width: 50px; } .small img { width: 50px; height: 50px; }
"""


@dataclass(frozen=True)
class Curve:
    """A named line over the steps."""

    name: str
    values: Sequence[float]


def draw_curves(title: str, steps: Sequence[int], curves: Sequence[Curve]) -> str:
    """Lines over steps as an SVG with axes and a legend."""
    if not steps or not curves:
        return ""
    lowest = min(min(curve.values) for curve in curves)
    highest = max(max(curve.values) for curve in curves)
    lowest, highest = min(0.0, lowest), highest if highest > lowest else lowest + 1.0

    def place(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * (step - steps[0]) / max(steps[-1] - steps[0], 1)
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - lowest) / (highest - lowest)
        return x, y

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img"><title>{html.escape(title)}</title>']
    parts.append(f'<text x="{MARGIN}" y="22" font-weight="bold">{html.escape(title)}</text>')
    for tick in range(5):
        value = lowest + (highest - lowest) * tick / 4
        x, y = place(steps[0], value)
        parts.append(f'<line x1="{x}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end" font-size="11">{value:.2f}</text>')
    for step in (steps[0], steps[len(steps) // 2], steps[-1]):
        x, y = place(step, lowest)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle" font-size="11">step {step}</text>')
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join("{:.1f},{:.1f}".format(*place(*pair)) for pair in zip(steps, curve.values, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        x = WIDTH - MARGIN - 64 * (len(curves) - number)
        parts.append(f'<text x="{x}" y="22" fill="{colour}" font-size="12">{html.escape(curve.name)}</text>')
    return "".join(parts) + "</svg>"


def draw_metrics(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Loss and, where there are any, gates and validation losses."""
    steps = [row["step"] for row in metrics]
    gates = metrics[-1]["gates"]
    drawn = [draw_curves("training loss (nats a target token)", steps, [Curve("loss", [r["loss"] for r in metrics])])]
    if gates:
        lines = [Curve(name.replace("_", " "), [row["gates"][name] for row in metrics]) for name in gates]
        drawn.append(draw_curves("tanh(gate) of the cross-attention layers", steps, lines))
    validated = [row for row in metrics if "validation" in row]
    if validated:
        curves = [
            Curve(name, [row["validation"][name]["loss"] for row in validated])
            for name in validated[0]["validation"]
            if all(row["validation"].get(name, {}).get("loss") is not None for row in validated)
        ]
        steps = [row["step"] for row in validated]
        drawn.append(draw_curves("validation loss (nats a target token)", steps, curves))
    return f'<div class="curves">{"".join(drawn)}</div>'


def draw_table(accuracy: Mapping[str, Mapping[str, float]]) -> str:
    """Share of characters right, a row for what the model sees and a column for each source."""
    sources = list(next(iter(accuracy.values())))
    head = "".join(f"<th>{html.escape(source)}</th>" for source in sources)
    rows = "".join(
        f"<tr><td>{html.escape(view)}</td>" + "".join(f"<td>{shares[source]:.1%}</td>" for source in sources) + "</tr>"
        for view, shares in accuracy.items()
    )
    return f"<table><tr><th>the model sees</th>{head}</tr>{rows}</table>"


def draw_example(raw: RawSample, answer: Mapping[str, str], tiling: TilingConfig) -> str:
    """The tiles of a sample as they lie in the image, with tags; the thumbnail; question, answer and truth."""
    grid = Grid(*raw.record["images"][0]["grid"])
    names = [*(f"tile_{number}" for number in range(1, grid.num_tiles + 1)), "thumbnail"]
    tags = tile_tags(grid, tiling.tag_format, tiling.thumbnail_tag)
    figures = [
        f'<figure><img alt="" src="data:image/jpeg;base64,{base64.b64encode(raw.pictures[f"0.{name}.jpg"]).decode()}">'
        f"<figcaption>{html.escape(tag)}</figcaption></figure>"
        for name, tag in zip(names, tags, strict=True)
    ]
    question = read_turns(raw.record)[-2].text.replace(IMAGE_PLACEHOLDER, "").strip()
    verdict = "right" if answer["answer"] == answer["truth"] else "wrong"
    return (
        f'<div class="example {verdict}"><div class="pictures"><div class="tiles {"small" if grid.cols > 3 else ""}" '
        f'style="grid-template-columns: repeat({grid.cols}, auto)">{"".join(figures[:-1])}</div>{figures[-1]}</div>'
        f"<p>{html.escape(question)}<br>answer <b>{html.escape(answer['answer'])}</b>, "
        f"truth <b>{html.escape(answer['truth'])}</b></p></div>"
    )


def write_report(run_dir: Path) -> Path:
    """Read what the run left behind and write the page."""
    run = load_run(RunDir(run_dir).config)
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert run.data.valid is not None
    shards = ShardSet(run.data.valid)
    by_key = {answer["key"]: answer for answer in evaluation["answers"] if answer["view"] == "images"}
    raws = [shards.read(number) for number in range(min(EXAMPLES, len(shards)))]
    examples = "".join(draw_example(raw, by_key[raw.key], run.tiling) for raw in raws)
    sources = json.loads((Path(run.data.valid).parent / "sources.json").read_text())
    seconds = sum(row["seconds"] for row in metrics)
    variant = run.model.variant.upper()
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>NVLM-{variant}</title>
<style>{STYLE}</style></head><body>
<h1>NVLM-{variant} learned to read images</h1>
<p>{len(metrics)} steps of {run.training.global_batch_size} samples in {seconds / 60:.1f} minutes, from random weights,
tensor parallel over {run.parallelism.tensor_model_parallel_size} processes. Each image is a grid of coloured parts, one a
tile; four characters stand on each, too small to be read in the thumbnail. The question asks for the part of one
colour. The images below were never trained on: neither were the scans of digits, the regions of photographs and the
pairs of letters on them.</p>
{draw_metrics(metrics)}
<h2>Characters right on {len(by_key)} held-out images</h2>
{draw_table(evaluation["accuracy"])}
<h2>The first {len(raws)} held-out images: tiles with their tags, thumbnail, question, answer</h2>
<div class="examples">{examples}</div>
<h2>Where the pictures come from</h2>
<ul>{"".join(f"<li>{html.escape(', '.join(source.values()))}</li>" for source in sources)}</ul>
</body></html>
"""
    path = RunDir(run_dir).report
    path.write_text(page)
    return path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write report.html of a demo run.")
    parser.add_argument("--run-dir", type=Path, required=True)
    print(f"the report is {write_report(parser.parse_args().run_dir).resolve()}")


if __name__ == "__main__":
    main()
