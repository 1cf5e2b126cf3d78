"""The terminal page of one run: state, losses, throughput, gates, tiles, and what went wrong."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.watching.history import History, present
from megatron_nvlm.watching.run_state import (
    Kind,
    RunState,
    StartRow,
    newest_checkpoint,
    read_config,
    read_state,
    train_steps_of,
    value_of,
)

COLOURS = {
    Kind.WAITING: "yellow",
    Kind.RUNNING: "green",
    Kind.STOPPED: "yellow",
    Kind.FINISHED: "cyan",
    Kind.FAILED: "red",
}
BARS = "▁▂▃▄▅▆▇█"
WINDOW_STEPS = 20
"""Steps whose mean is the throughput of the moment."""
SHOWN = 5
"""Rows of what can be many: gates, validation sets, starts, stragglers."""
NAMES_AND_VALUES = 40
"""Columns of the terminal that names and values take beside sparkline and note."""


class RunPage:
    """The page of a run; each `render` reads what is new."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.history = History(run_dir)

    def render(self, width: int) -> Group:
        """The page as it is now, for a terminal of so many columns."""
        self.history.refresh()
        history, config = self.history, read_config(self.run_dir)
        last_step = history.steps[-1] if len(history) else 0
        state = read_state(self.run_dir, config, last_step)
        train_steps = train_steps_of(self.run_dir, config)
        parts: list[Any] = [self._head(state, config, last_step, train_steps, width)]
        if len(history):
            rows = [*_losses(history), *_throughput(history), *_use(history), *_tiles(history), *_gates(history)]
            parts.append(_metrics_table(rows, max(10, (width - NAMES_AND_VALUES) // 2)))
        parts.append(_trouble_table([*_trouble(history), *_restarts(state.starts)]))
        return Group(*parts)

    def _head(
        self, state: RunState, config: Mapping[str, Any], last_step: int, train_steps: int | None, width: int
    ) -> Panel:
        variant = value_of(config, "model.variant")
        name = f"{self.run_dir}" + (f"  NVLM-{variant.upper()}" if isinstance(variant, str) else "")
        colour = COLOURS[state.kind]
        lines: list[Any] = [Text.assemble((str(state.kind), f"bold {colour}"), "  ", state.sentence)]
        if train_steps and last_step:
            room = max(width - 4, 1)
            done = min(room, room * last_step // train_steps)
            lines.append(Text.assemble(("━" * done, colour), ("─" * (room - done), "dim")))
        lines.append(Text(", ".join(self._progress(state, last_step, train_steps))))
        return Panel(Group(*lines), title=Text(name, "bold"), title_align="left", border_style=colour)

    def _progress(self, state: RunState, last_step: int, train_steps: int | None) -> Iterator[str]:
        yield f"step {last_step}" + (f" of {train_steps} ({last_step / train_steps:.0%})" if train_steps else "")
        seconds = present(self.history.column("seconds")[-10 * WINDOW_STEPS :])
        if train_steps and seconds and last_step < train_steps:
            left = duration((train_steps - last_step) * median(seconds))
            yield f"{left} left" if state.kind is Kind.RUNNING else f"{left} of training missing"
        trained = self.history.total("seconds")
        if trained:
            yield f"{duration(trained)} trained"
        newest = newest_checkpoint(self.run_dir)
        yield "no checkpoint yet" if newest is None else f"last checkpoint: step {newest}"


Row = tuple[str, str, Sequence[float], str]
"""A metric: name, value now, its course, note."""


def _losses(history: History) -> Iterator[Row]:
    loss = history.column("loss")
    finite = [pair for pair in zip(loss, history.steps, strict=True) if math.isfinite(pair[0])]
    lowest = f"lowest {min(finite)[0]:.4f} at step {min(finite)[1]}" if finite else ""
    yield "loss", f"{loss[-1]:.4f}", loss, lowest
    norms = history.column("grad_norm")
    skipped = len(history.skipped)
    note = f"{skipped} updates left out" if skipped else ""
    yield "gradient norm", f"{norms[-1]:.3f}", norms, note
    rates = history.column("learning_rate")
    yield "learning rate", f"{rates[-1]:.2e}", rates, ""
    names = [name for name in history.names if name.startswith("validation/") and name.endswith("/loss")]
    for name in names[:SHOWN]:
        losses = history.column(name)
        accuracy = history.last(f"{name.removesuffix('loss')}token_accuracy")
        note = "" if math.isnan(accuracy) else f"{accuracy:.1%} of tokens right"
        yield name.removesuffix("/loss"), f"{history.last(name):.4f}", present(losses), note
    if len(names) > SHOWN:
        yield "", "", (), f"and {len(names) - SHOWN} more validation sets"


def rates_of(history: History, name: str) -> list[float]:
    """A counted metric by second, of each step; NaN for a step without it or without time."""
    pairs = zip(history.column(name), history.column("seconds"), strict=True)
    return [count / seconds if seconds > 0 else math.nan for count, seconds in pairs]


def _throughput(history: History) -> Iterator[Row]:
    seconds = history.total("seconds", WINDOW_STEPS)
    for name in ("samples", "tokens", "tiles"):
        rate = history.total(name, WINDOW_STEPS) / seconds if seconds else math.nan
        note = f"mean of {min(WINDOW_STEPS, len(history))} steps" if name == "samples" else ""
        yield f"{name} a second", f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}", rates_of(history, name), note
    times = history.column("seconds")
    waited = history.total("save_wait_seconds")
    note = f"{duration(waited)} waited for saves" if waited >= 1 else ""
    yield "seconds a step", f"{times[-1]:.3f}", times, note


def _use(history: History) -> Iterator[Row]:
    """How well ranks were used; nothing of runs that did not count it."""
    speeds = history.column("tflops_per_rank")
    if any(present(speeds)):
        notes = [
            f"{word} {_mean(history, name):.1%}"
            for word, name in (("MFU", "mfu"), ("HFU", "hfu"), ("vision", "vision_share"))
            if name in history.names
        ]
        yield "TFLOP/s a rank", f"{_mean(history, 'tflops_per_rank'):.3g}", speeds, ", ".join(notes)
    if "data_wait_share" in history.names:
        padding = (
            f"padding: {_mean(history, 'padding_share'):.1%} of tokens" if "padding_share" in history.names else ""
        )
        shares = history.column("data_wait_share")
        yield "waiting for data", f"{_mean(history, 'data_wait_share'):.1%}", shares, padding
    if "peak_memory_gib" in history.names:
        memory = history.column("peak_memory_gib")
        owner = f"of the {history.peak_memory_of}, " if history.peak_memory_of else ""
        yield "peak memory GiB", f"{memory[-1]:.2f}", memory, f"{owner}on the fullest rank"


def _mean(history: History, name: str) -> float:
    """Of the last steps; NaN where none has the metric."""
    known = present(history.column(name)[-WINDOW_STEPS:])
    return sum(known) / len(known) if known else math.nan


def _tiles(history: History) -> Iterator[Row]:
    tiles = history.column("tiles_per_rank")
    if not any(present(tiles)):
        return
    encoder, whole = history.total("vision_seconds", WINDOW_STEPS), history.total("seconds", WINDOW_STEPS)
    note = f"encoder: {encoder / whole:.0%} of a step" if whole else ""
    yield "tiles a rank", f"{tiles[-1]:.1f}", tiles, note
    imbalance = history.column("tile_imbalance")
    yield "tile imbalance", f"{imbalance[-1]:.2f}", imbalance, "most over mean; 1 is even"


def _gates(history: History) -> Iterator[Row]:
    names = history.gates
    places = sorted({round(index * (len(names) - 1) / max(SHOWN - 1, 1)) for index in range(SHOWN)}) if names else []
    for place in places:
        values = history.column(names[place])
        note = "tanh(gate)" if place == 0 else ""
        if place == places[-1] and len(names) > SHOWN:
            note = f"{SHOWN} of {len(names)} gates are shown"
        name = names[place].removeprefix("gates/").replace("_", " ")
        yield f"gate of {name}", f"{values[-1]:+.4f}", values, note


def _trouble(history: History) -> Iterator[tuple[str, str]]:
    bad, used = history.total("bad_samples"), history.total("samples")
    kinds = [(name.removeprefix("bad/"), history.total(name)) for name in history.names if name.startswith("bad/")]
    kinds.sort(key=lambda pair: -pair[1])
    told = f" ({', '.join(f'{count:.0f} {kind}' for kind, count in kinds[:SHOWN])})" if kinds else ""
    if len(history):
        yield "bad samples", f"{bad:.0f} of {bad + used:.0f}{told}" if bad else f"none of {used:.0f}"
    for step, reason in history.skipped[-SHOWN:]:
        yield "update left out", f"step {step}: {reason}"
    if not history.stragglers:
        yield "stragglers", "none was named"
    for step, slow in history.stragglers[-SHOWN:]:
        yield "stragglers", f"step {step}: {', '.join(map(_straggler, slow[:SHOWN]))}"


def _straggler(one: Mapping[str, Any]) -> str:
    times = ""
    if isinstance(one.get("seconds"), int | float) and isinstance(one.get("median"), int | float):
        times = f" {one['seconds']:.2f} s, its peers {one['median']:.2f} s"
    return f"rank {one.get('rank', '?')} on {one.get('node', '?')}{times}"


def _restarts(starts: Sequence[StartRow]) -> Iterator[tuple[str, str]]:
    if not starts:
        return
    yield (
        "starts by jobs",
        f"{len(starts)}, {sum(start.ending in ('failed', 'deterministic') for start in starts)} failed",
    )
    for start in starts[-SHOWN:]:
        until = (
            "is at work, or its end is not known" if not start.ending else f"{start.ending} at step {start.last_step}"
        )
        nodes = f", to blame: {', '.join(start.failed_nodes)}" if start.failed_nodes else ""
        when = time.strftime("%d %b %H:%M", time.localtime(start.began)) if start.began else "?"
        yield "", f"{start.name} began {when} at step {start.first_step}, {until}{nodes}"


def _metrics_table(rows: Sequence[Row], sparkline_width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=max(len(row[0]) for row in rows))
    table.add_column(justify="right", no_wrap=True, style="bold", min_width=max(len(row[1]) for row in rows))
    table.add_column(no_wrap=True, style="blue")
    table.add_column(style="dim", overflow="ellipsis", no_wrap=True)
    for name, value, course, note in rows:
        table.add_row(Text(name), Text(value), Text(sparkline(course, sparkline_width)), Text(note))
    return table


def _trouble_table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    if rows:
        table.add_row("")
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of a metric from first to last, at most `width` characters; a mean is drawn where steps share one."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * index // count for index in range(count + 1)]
    pieces = [present(values[start:end]) for start, end in zip(edges, edges[1:], strict=False)]
    means = [sum(piece) / len(piece) if piece else math.nan for piece in pieces]
    known = present(means)
    if not known:
        return ""
    lowest, span = min(known), max(known) - min(known)
    heights = [BARS[_height(mean - lowest, span)] if math.isfinite(mean) else " " for mean in means]
    return "".join(heights)


def _height(above: float, span: float) -> int:
    return min(int(above / span * len(BARS)), len(BARS) - 1) if 0 < span < math.inf else 0


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    if not math.isfinite(seconds):
        return "? s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
