"""What a set holds and what training on it will take, from its index alone: histograms, packing, steps per epoch."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nvlm.data.order.lengths import LengthCounter, SampleSizes
from megatron_nvlm.data.order.packing import PackingConfig, pack_window
from megatron_nvlm.data.shards.index import UNKNOWN_TOKENS, Index
from megatron_nvlm.image.pixels import MAX_PIXELS
from megatron_nvlm.image.tiling import TilingConfig, choose_grid
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.tokenizer import Tokenizer

REPORT_FILES = ("report.txt", "report.html")
PAPER_LENGTHS = {"d": 3200, "x": 1024, "h": 1280}
"""Decoder length in SFT (NVLM paper, table 11)."""
MOST_SAMPLES_LOOKED_AT = 100_000
"""Larger sets are predicted from this number of samples, evenly spaced."""
_PIXELS_PER_TOKEN_EDGE = 28
"""Patches of the encoders have 14 pixels along an edge, and pixel shuffle joins 2x2 of them."""


@dataclass(frozen=True)
class Histogram:
    """Counts of named bins."""

    title: str
    bins: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Prediction:
    """What training a variant on this set takes."""

    variant: str
    sequence_length: int
    too_long: int
    """Samples (of those looked at) that have no room even with one tile."""
    fewer_tiles: int
    """Samples that give up tiles to fit."""
    mean_tokens: float
    mean_tiles: float
    unpacked_efficiency: float
    packed_efficiency: float
    samples_per_pack: float
    steps_unpacked: int
    steps_packed: int


@dataclass(frozen=True)
class TrainingPlan:
    """What the prediction is for. A length of None is the paper's for each variant."""

    tokenizer: Tokenizer
    tiling: TilingConfig
    template: str
    global_batch_size: int
    sequence_length: int | None = None
    variants: tuple[str, ...] = ("d", "x", "h")


def histograms(index: Index, tiling: TilingConfig) -> list[Histogram]:
    """Of tiles, text tokens, image sizes and images per sample."""
    images = np.asarray(index.images)
    pictures = [_num_pictures(image, tiling) for image in images.tolist()]
    longest = np.maximum(images["width"], images["height"]).astype(np.int64)
    found = [
        Histogram("images per sample", _by_value(index.samples["num_images"])),
        Histogram("tiles per image, with thumbnail", _by_value(np.array([one for one in pictures if one]))),
        Histogram("longer side of images, pixels", _by_edges(longest, (224, 448, 672, 896, 1344, 2688))),
        Histogram("aspect ratio, width to height", _by_edges(_aspects(images), (0.25, 0.5, 0.75, 1.0, 1.34, 2, 4))),
    ]
    tokens = np.asarray(index.samples["num_text_tokens"]).astype(np.int64)
    tokens = tokens[tokens != UNKNOWN_TOKENS]
    if len(tokens):
        found.append(Histogram("text tokens per sample", _by_edges(tokens, (16, 32, 64, 128, 256, 512, 1024, 2048))))
    return [one for one in found if one.bins]


def _num_pictures(image: tuple[int, int, int, int], tiling: TilingConfig) -> int:
    width, height, cols, rows = image
    if cols:
        return cols * rows + (cols * rows > 1)
    if not 0 < width * height <= MAX_PIXELS:
        return 0
    return choose_grid(width, height, tiling.max_tiles, tiling.tile_size).num_pictures


def _aspects(images: np.ndarray) -> np.ndarray:
    known = images[(images["width"] > 0) & (images["height"] > 0)]
    return known["width"] / known["height"]


def _by_value(values: np.ndarray) -> list[tuple[str, int]]:
    found, counts = np.unique(values, return_counts=True)
    return [(str(value), int(count)) for value, count in zip(found.tolist(), counts, strict=True)]


def _by_edges(values: np.ndarray, edges: Sequence[float]) -> list[tuple[str, int]]:
    if not len(values):
        return []
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    names = [f"under {edges[0]:g}", *(f"{a:g} to {b:g}" for a, b in zip(edges, edges[1:], strict=False))]
    return list(zip([*names, f"{edges[-1]:g} and more"], counts.tolist(), strict=True))


def predict(index: Index, plan: TrainingPlan) -> list[Prediction]:
    """For each variant; needs text that was counted when the shards were built."""
    step = -(-len(index.samples) // MOST_SAMPLES_LOOKED_AT)
    numbers = np.arange(0, len(index.samples), step)
    tokens_per_tile = (-(-plan.tiling.tile_size // _PIXELS_PER_TOKEN_EDGE)) ** 2
    predictions = []
    for name in plan.variants:
        length = plan.sequence_length or PAPER_LENGTHS[name]

        def sizes(limit: int, name: str = name) -> SampleSizes:
            counter = LengthCounter(
                plan.tokenizer, plan.tiling, VARIANTS[name], tokens_per_tile, limit, template=plan.template
            )
            return counter.sizes(index, numbers)

        fitted, whole = sizes(length), sizes(1 << 40)
        used = fitted.tokens > 0
        lengths, num_packs = fitted.tokens[used], 0
        window = PackingConfig().window_samples
        for start in range(0, len(lengths), window):
            part = SampleSizes(lengths[start : start + window], fitted.tiles[used][start : start + window])
            num_packs += len(pack_window(part, length))
        mean = float(lengths.mean()) if len(lengths) else 0.0
        per_pack = len(lengths) / num_packs if num_packs else 0.0
        usable = len(index.samples) * (len(lengths) / len(numbers))
        predictions.append(
            Prediction(
                variant=name,
                sequence_length=length,
                too_long=int(((whole.tokens > 0) & ~used).sum()),
                fewer_tiles=int((used & (fitted.tiles < whole.tiles)).sum()),
                mean_tokens=mean,
                mean_tiles=float(fitted.tiles[used].mean()) if len(lengths) else 0.0,
                unpacked_efficiency=mean / length,
                packed_efficiency=float(lengths.sum()) / (num_packs * length) if num_packs else 0.0,
                samples_per_pack=per_pack,
                steps_unpacked=-int(-usable // plan.global_batch_size),
                steps_packed=-int(-usable // (plan.global_batch_size * max(per_pack, 1))),
            )
        )
    return predictions


_COLUMNS = (
    ("variant", lambda p: f"NVLM-{p.variant.upper()}"),
    ("sequence length", lambda p: str(p.sequence_length)),
    ("tokens per sample", lambda p: f"{p.mean_tokens:.1f}"),
    ("tiles per sample", lambda p: f"{p.mean_tiles:.2f}"),
    ("give up tiles", lambda p: str(p.fewer_tiles)),
    ("too long", lambda p: str(p.too_long)),
    ("row filled, unpacked", lambda p: f"{p.unpacked_efficiency:.1%}"),
    ("row filled, packed", lambda p: f"{p.packed_efficiency:.1%}"),
    ("samples per pack", lambda p: f"{p.samples_per_pack:.2f}"),
    ("steps per epoch, unpacked", lambda p: str(p.steps_unpacked)),
    ("steps per epoch, packed", lambda p: str(p.steps_packed)),
)


def as_text(
    manifest: Mapping[str, Any], found: Sequence[Histogram], predictions: Sequence[Prediction], batch: int
) -> str:
    """The report for a terminal."""
    lines = [f"{name}: {value}" for name, value in _facts(manifest)]
    for histogram in found:
        most = max(count for _, count in histogram.bins)
        lines.append(f"\n{histogram.title}")
        for name, count in histogram.bins:
            lines.append(f"  {name:>16} {count:>9} {'#' * round(40 * count / most)}")
    if manifest.get("unread"):
        lines.append("\nnot read, and in how many inputs or files")
        lines += [f"  {name:>26} {count:>9}" for name, count in manifest["unread"].items()]
    if predictions:
        lines.append(f"\ntraining with a global batch of {batch} (samples, or packs if packed)")
        for title, show in _COLUMNS:
            lines.append(f"  {title:>26} " + " ".join(f"{show(one):>12}" for one in predictions))
    else:
        lines.append("\ntext was not counted: give --tokenizer for token counts, packing and steps per epoch")
    return "\n".join(lines) + "\n"


def as_html(
    manifest: Mapping[str, Any], found: Sequence[Histogram], predictions: Sequence[Prediction], batch: int
) -> str:
    """The report as one page without anything from elsewhere."""
    page = [
        "<!doctype html><meta charset=utf-8><title>Shards</title><style>body{font:15px sans-serif;max-width:60em;"
        "margin:2em auto;color:#222}table{border-collapse:collapse}td,th{padding:.15em .7em;text-align:right;"
        "font-weight:normal}th{text-align:left;color:#555}.bar{background:#4a7ab5;height:1em}td.b{width:24em}"
        "h2{margin-top:1.6em;font-size:1.05em}pre{background:#f4f4f4;padding:.7em;overflow:auto}</style><h1>Shards</h1>"
    ]
    page.append("<table>" + "".join(_row(name, value) for name, value in _facts(manifest)) + "</table>")
    if predictions:
        page.append(f"<h2>Training with a global batch of {batch} (samples, or packs if packed)</h2><table>")
        for title, show in _COLUMNS:
            page.append(_row(title, *(show(one) for one in predictions)))
        page.append("</table>")
    else:
        page.append("<p>Text was not counted: give --tokenizer for token counts, packing and steps per epoch.</p>")
    for histogram in found:
        most = max(count for _, count in histogram.bins)
        page.append(f"<h2>{html.escape(histogram.title)}</h2><table>")
        for name, count in histogram.bins:
            bar = f"<td class=b><div class=bar style='width:{100 * count / most:.1f}%'></div></td>"
            page.append(f"<tr><th>{html.escape(name)}</th>{bar}<td>{count}</td></tr>")
        page.append("</table>")
    if manifest["rejects_by_reason"]:
        page.append("<h2>Rejected, by reason (each in rejects.jsonl)</h2><table>")
        page += [_row(reason, count) for reason, count in manifest["rejects_by_reason"].items()]
        page.append("</table>")
    if manifest.get("unread"):
        page.append("<h2>Not read, and in how many inputs or files</h2><table>")
        page += [_row(name, count) for name, count in manifest["unread"].items()]
        page.append("</table>")
    settings = json.dumps(manifest["plan"], indent=1, ensure_ascii=False)
    page.append(f"<h2>Inputs and settings</h2><pre>{html.escape(settings)}</pre>")
    return "\n".join(page) + "\n"


def _row(name: object, *values: object) -> str:
    return (
        f"<tr><th>{html.escape(str(name))}</th>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in values) + "</tr>"
    )


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts, size = manifest["counts"], sum(shard["size"] for shard in manifest["shards"])
    unknown = "not counted"
    return [
        ("samples", f"{counts['num_samples']} of {counts['num_inputs']} inputs, {counts['num_rejects']} rejected"),
        ("shards", f"{len(manifest['shards'])}, {size / 1e6:.1f} MB"),
        ("images", str(counts["num_images"])),
        ("tiles cut in advance", str(counts["num_tiles"])),
        ("text tokens", unknown if counts["num_text_tokens"] is None else str(counts["num_text_tokens"])),
    ]


def write_report(folder: Path, texts: tuple[str, str]) -> None:
    """Text and page beside the shards."""
    for name, text in zip(REPORT_FILES, texts, strict=True):
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
