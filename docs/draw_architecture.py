"""Draw docs/architecture.svg: the way of one image from a shard to the loss. `python docs/draw_architecture.py`."""

from pathlib import Path
from xml.sax.saxutils import escape

# Lane -> its boxes, from left to right: (what, where).
LANES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("order", (("place i of the run", "data/order"), ("sample by the index", "data/shards"))),
    ("sample", (("tiles and tags", "image"), ("turns to ids", "text"), ("tokens, intervals", "sequence"))),
    (
        "batch",
        (("prepare one sample", "data/prepare.py"), ("micro-batch", "data/collate.py"), ("workers", "data/loading")),
    ),
    ("model", (("encoder, projector", "models"), ("decoder stages", "models"), ("cross-attention", "ops"))),
    ("step", (("loss, gradients", "training/step.py"), ("metrics", "training"), ("checkpoint", "checkpoint"))),
    ("after", (("answers", "inference"), ("scores", "evaluation"), ("Hugging Face folder", "hf"))),
)
WIDTH, HEIGHT, GAP, LABEL = 190, 54, 26, 80


def box(left: int, top: int, what: str, where: str) -> str:
    """A box of two lines."""
    middle = left + WIDTH // 2
    return (
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#eef3fb" stroke="#4a6fa5"/>'
        f'<text x="{middle}" y="{top + 23}" text-anchor="middle" font-size="14">{escape(what)}</text>'
        f'<text x="{middle}" y="{top + 42}" text-anchor="middle" font-size="11" fill="#555">{escape(where)}</text>'
    )


def arrow(left: int, top: int, right: int, bottom: int) -> str:
    """A line with a head."""
    return f'<line x1="{left}" y1="{top}" x2="{right}" y2="{bottom}" stroke="#333" marker-end="url(#head)"/>'


def draw() -> str:
    """The picture as SVG."""
    parts = []
    for lane, (name, boxes) in enumerate(LANES):
        top = 10 + lane * (HEIGHT + GAP)
        parts.append(f'<text x="8" y="{top + 32}" font-size="13" fill="#4a6fa5">{name}</text>')
        for column, (what, where) in enumerate(boxes):
            left = LABEL + column * (WIDTH + GAP)
            parts.append(box(left, top, what, where))
            if column:
                parts.append(arrow(left - GAP, top + HEIGHT // 2, left - 4, top + HEIGHT // 2))
        if lane:
            parts.append(arrow(LABEL + WIDTH // 2, top - GAP, LABEL + WIDTH // 2, top - 4))
    width, height = LABEL + 3 * (WIDTH + GAP), 10 + len(LANES) * (HEIGHT + GAP)
    head = (
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0,0 L6,3 L0,6 z" fill="#333"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>{head}\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("architecture.svg").write_text(draw())
