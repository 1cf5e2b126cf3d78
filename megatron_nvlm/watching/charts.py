"""Charts of lines, as SVG for pages and as a picture: the same strokes and labels, by two painters."""

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 34, 34
"""Margins around the lines."""
MOST_POINTS = 1000
"""Points of a line that are drawn; of more, the lowest and the highest of each stretch."""
COLOURS = ("#1f6fb2", "#d1495b", "#2f855a", "#b7791f", "#6b46c1", "#555555", "#0e7490", "#be185d")
DASHES: tuple[tuple[int, ...], ...] = ((), (7, 3), (2, 3), (9, 3, 2, 3))
LARGEST, SMALLEST = 1e100, 1e-100
"""A number beyond the former is drawn as no number is, and a range under the latter as one number (our choice)."""
_GREY, _TEXT = "#dddddd", "#222222"
_CLEARER = 2
"""Pixels of a picture for each unit of a chart; lines are drawn twice as fine and averaged."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A named line; it has a gap where y is no finite number."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    dash: tuple[int, ...] = ()
    """Lengths of strokes and gaps in turn; empty for a whole line."""


@dataclass(frozen=True)
class Chart:
    """Lines over one axis."""

    title: str
    x_name: str
    lines: tuple[Line, ...]
    from_zero: bool = False
    """Whether the vertical axis has 0 in it."""
    with_names: bool = False
    """Whether the names of the lines stand in the chart; elsewhere a page has them once for all charts."""

    @property
    def is_empty(self) -> bool:
        """Whether there is no point to draw."""
        return not any(abs(y) < LARGEST for line in self.lines for y in line.ys)


@dataclass(frozen=True)
class _Stroke:
    points: Sequence[Point]
    colour: str
    width: float
    dash: tuple[int, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class _Label:
    x: float
    y: float
    text: str
    size: int = 11
    anchor: str = "start"
    """start, middle or end."""
    colour: str = _TEXT


def ticks(lowest: float, highest: float, count: int = 5) -> list[float]:
    """About `count` round numbers within a range."""
    span = highest - lowest
    if not 0 < span < math.inf:
        return [lowest]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next((factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= count), 10 * power)
    return [number * step for number in range(math.ceil(lowest / step), math.floor(highest / step) + 1)]


def tick_label(value: float) -> str:
    """A number in few characters: 0.25, 1500, 2e-06, 3.5M."""
    if abs(value) >= 1e6:
        scale, letter = (1e12, "T") if abs(value) >= 1e12 else (1e9, "G") if abs(value) >= 1e9 else (1e6, "M")
        return f"{value / scale:.4g}{letter}"
    return f"{value:.4g}"


def _pieces(line: Line) -> Iterator[list[Point]]:
    """The points of a line between its gaps; of long ones, the lowest and the highest of each stretch."""
    stretch = max(1, math.ceil(2 * len(line.ys) / MOST_POINTS))
    piece: list[Point] = []
    for start in range(0, len(line.ys), stretch):
        pairs = zip(line.xs[start : start + stretch], line.ys[start : start + stretch], strict=True)
        known = [pair for pair in pairs if abs(pair[1]) < LARGEST]
        if known:
            piece += sorted({min(known, key=lambda pair: pair[1]), max(known, key=lambda pair: pair[1])})
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def _bounds(chart: Chart) -> tuple[float, float, float, float]:
    """Least and most of x and y."""
    pairs = [pair for line in chart.lines for piece in _pieces(line) for pair in piece]
    xs, ys = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    low, high = min(ys), max(ys)
    if chart.from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= max(SMALLEST, 1e-12 * max(abs(high), abs(low))):
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    left, right = min(xs), max(xs)
    return left, right if right > left else left + 1, low, high


def _compose(chart: Chart) -> Iterator[_Stroke | _Label]:
    """What stands in a chart, in its own units from the top left corner."""
    yield _Label(LEFT, 20, chart.title, 13)
    if chart.is_empty:
        yield _Label(WIDTH / 2, HEIGHT / 2, "no step has it", 11, "middle")
        return
    left, right, low, high = _bounds(chart)

    def place(x: float, y: float) -> Point:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (x - left) / (right - left),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low),
        )

    for value in ticks(low, high):
        height = place(left, value)[1]
        yield _Stroke([(LEFT, height), (WIDTH - RIGHT, height)], _GREY, 1)
        yield _Label(LEFT - 6, height + 4, tick_label(value), anchor="end")
    for value in ticks(left, right, 6):
        x = place(value, low)[0]
        yield _Stroke([(x, HEIGHT - BOTTOM), (x, HEIGHT - BOTTOM + 4)], _GREY, 1)
        yield _Label(x, HEIGHT - BOTTOM + 16, tick_label(value), anchor="middle")
    yield _Label(WIDTH - RIGHT, HEIGHT - 4, chart.x_name, anchor="end")
    at = WIDTH - RIGHT
    for line in reversed(chart.lines):
        if chart.with_names:
            yield _Label(at, 20, line.name, 12, "end", line.colour)
            at -= 7 * len(line.name) + 12
    for line in chart.lines:
        for piece in _pieces(line):
            places = [place(*pair) for pair in piece]
            if len(places) == 1:  # a single point would not be seen
                places = [(places[0][0] - 2, places[0][1]), (places[0][0] + 2, places[0][1])]
            yield _Stroke(places, line.colour, 1.5, line.dash, line.name)


def to_svg(chart: Chart) -> str:
    """A chart as an element of a page."""
    title = html.escape(chart.title)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img"><title>{title}</title>']
    for item in _compose(chart):
        if isinstance(item, _Label):
            weight = ' font-weight="bold"' if item.size == 13 else ""
            parts.append(
                f'<text x="{item.x:.1f}" y="{item.y:.1f}" font-size="{item.size}" text-anchor="{item.anchor}" '
                f'fill="{item.colour}"{weight}>{html.escape(item.text)}</text>'
            )
        else:
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in item.points)
            dash = f' stroke-dasharray="{" ".join(map(str, item.dash))}"' if item.dash else ""
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{item.colour}" stroke-width="{item.width}"{dash}>'
                f"{f'<title>{html.escape(item.name)}</title>' if item.name else ''}</polyline>"
            )
    return "".join(parts) + "</svg>"


def to_picture(charts: Sequence[Chart], names: Sequence[tuple[str, str]], columns: int = 2) -> Image.Image:
    """Charts side by side under one row of names.

    Args:
        names: (name, colour) of what the colours mean.
    """
    columns = max(1, min(columns, len(charts)))
    rows = -(-len(charts) // columns)
    head = 22 * len(names) + 16
    picture = Image.new("RGB", (_CLEARER * columns * WIDTH, _CLEARER * (head + rows * HEIGHT)), "white")
    legend: list[_Stroke | _Label] = []
    for place, (name, colour) in enumerate(names):
        height = 22 * (place + 1)
        legend.append(_Stroke([(LEFT, height - 5), (LEFT + 22, height - 5)], colour, 3))
        legend.append(_Label(LEFT + 30, height, name, 14))
    _paint(ImageDraw.Draw(picture), legend, _CLEARER)
    for place, chart in enumerate(charts):
        corner = (place % columns * WIDTH * _CLEARER, (head + place // columns * HEIGHT) * _CLEARER)
        picture.paste(_paint_chart(chart), corner)
    return picture


def _paint_chart(chart: Chart) -> Image.Image:
    items = list(_compose(chart))
    fine = Image.new("RGB", (2 * _CLEARER * WIDTH, 2 * _CLEARER * HEIGHT), "white")
    _paint(ImageDraw.Draw(fine), items, 2 * _CLEARER)
    return fine.resize((_CLEARER * WIDTH, _CLEARER * HEIGHT), Image.Resampling.LANCZOS)


def _paint(draw: ImageDraw.ImageDraw, items: Sequence[_Stroke | _Label], scale: int) -> None:
    anchors = {"start": "ls", "middle": "ms", "end": "rs"}
    for item in items:
        if isinstance(item, _Label):
            font = ImageFont.load_default(item.size * scale)
            draw.text((item.x * scale, item.y * scale), item.text, item.colour, font, anchors[item.anchor])
        else:
            for piece in _dashed(item.points, item.dash):
                places = [(x * scale, y * scale) for x, y in piece]
                draw.line(places, item.colour, round(item.width * scale), joint="curve")


def _dashed(points: Sequence[Point], dash: tuple[int, ...]) -> Iterator[list[Point]]:
    """The strokes of a dashed line; all of it without dashes."""
    if not dash:
        yield list(points)
        return
    place, left, stroke = 0, float(dash[0]), [points[0]]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        length, done = math.hypot(x1 - x0, y1 - y0), 0.0
        while length - done > left:
            done += left
            at = (x0 + (x1 - x0) * done / length, y0 + (y1 - y0) * done / length)
            if place % 2 == 0:
                yield [*stroke, at]
            place, stroke = place + 1, [at]
            left = float(dash[place % len(dash)])
        left -= length - done
        stroke.append((x1, y1))
    if place % 2 == 0:
        yield stroke
