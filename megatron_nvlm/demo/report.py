"""One self-contained page about a demo run: `python -m megatron_nvlm.demo.report --run-dir DIR` writes DIR/report.html.

It shows the loss and the gates over the steps, how often held-out answers are right with and without the images, and
held-out images with their tiles and tags, question, answer and truth.
"""

import argparse
import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.config.load import load_run
from megatron_nvlm.data.shards.read import RawSample, ShardSet
from megatron_nvlm.image.tile_tags import tile_tags
from megatron_nvlm.image.tiling import Grid, TilingConfig
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.text.conversation import IMAGE_PLACEHOLDER, read_turns
from megatron_nvlm.watching.charts import COLOURS, Chart, Line, to_svg

EXAMPLES = 24
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


def draw_metrics(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Loss and, where there are any, gates and validation losses."""
    steps = [row["step"] for row in metrics]
    gates = metrics[-1]["gates"]
    losses = Line("loss", steps, [row["loss"] for row in metrics], COLOURS[0])
    charts = [Chart("training loss (nats a target token)", "step", (losses,), from_zero=True)]
    if gates:
        lines = [
            Line(name.replace("_", " "), steps, [row["gates"][name] for row in metrics], COLOURS[place % len(COLOURS)])
            for place, name in enumerate(gates)
        ]
        title = "tanh(gate) of the cross-attention layers"
        charts.append(Chart(title, "step", tuple(lines), from_zero=True, with_names=True))
    charts += _validation_chart(metrics)
    return f'<div class="curves">{"".join(map(to_svg, charts))}</div>'


def _validation_chart(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    validated = [row for row in metrics if "validation" in row]
    if not validated:
        return []
    steps = [row["step"] for row in validated]
    lines = [
        Line(name, steps, [row["validation"][name]["loss"] for row in validated], COLOURS[place % len(COLOURS)])
        for place, name in enumerate(validated[0]["validation"])
        if all(row["validation"].get(name, {}).get("loss") is not None for row in validated)
    ]
    return [Chart("validation loss (nats a target token)", "step", tuple(lines), from_zero=True, with_names=True)]


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
