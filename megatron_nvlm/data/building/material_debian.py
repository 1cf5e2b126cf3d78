"""Demo material from Debian packages, where they are installed: emoji, flags, definitions."""

import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megatron_nvlm.data.building.material import Item, Source

_EMOJI_SIZE = 109
"""Pixels of the bitmaps in Noto Color Emoji; no other size loads."""


def _emoji(root: Path) -> list[tuple[str, str]]:
    """(emoji, name) of Unicode's list, those of one code point, each picture once."""
    text = (root / "usr/share/unicode/emoji/emoji-test.txt").read_text(encoding="utf-8")
    pattern = r"^([0-9A-F]+) +; fully-qualified +# (\S+) E[\d.]+ (.+)$"
    return [(match[2], match[3]) for match in re.finditer(pattern, text, re.MULTILINE)]


def make_emoji(rng: random.Random, number: int, root: Path) -> Iterator[Item]:
    """Emoji alone, and in grids to count and place."""
    face = ImageFont.truetype(str(root / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"), _EMOJI_SIZE)
    names = _emoji(root)
    for place in range(number):
        cols, rows = (1, 1) if place % 2 else (rng.randrange(1, 6), rng.randrange(1, 4))
        chosen = rng.sample(names, cols * rows)
        paper = rng.choice(((255, 255, 255), (230, 240, 250), (40, 44, 52)))
        picture = Image.new("RGB", (160 * cols, 160 * rows), paper)
        draw = ImageDraw.Draw(picture)
        for slot, (emoji, _) in enumerate(chosen):
            middle = (160 * (slot % cols) + 80, 160 * (slot // cols) + 80)
            draw.text(middle, emoji, font=face, embedded_color=True, anchor="mm")
        slot = rng.randrange(len(chosen))
        question = (
            f"What is in column {slot % cols + 1} of row {slot // cols + 1}?" if cols * rows > 1 else "What is this?"
        )
        yield Item(question, chosen[slot][1], chosen[slot][1], picture)


def make_flags(rng: random.Random, number: int, root: Path) -> Iterator[Item]:
    """Flags of countries; pictures that two countries share are left out."""
    listed = json.loads((root / "usr/share/iso-codes/json/iso_3166-1.json").read_text(encoding="utf-8"))["3166-1"]
    files = [(one, root / f"usr/share/iso-flags-png-320x240/{one['alpha_2'].lower()}.png") for one in listed]
    if not any(path.is_file() for _, path in files):
        raise FileNotFoundError("iso-flags-png-320x240")
    by_picture: dict[str, list[tuple[str, Path]]] = {}
    for country, path in files:
        if path.is_file():
            name = country.get("common_name", country["name"])
            by_picture.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), []).append((name, path))
    alone = sorted(found[0] for found in by_picture.values() if len(found) == 1)
    for name, path in rng.sample(alone, min(number, len(alone))):
        with Image.open(path) as picture:
            yield Item("Which country's flag is this?", name, name, picture.convert("RGB"))


def make_definitions(rng: random.Random, number: int, root: Path) -> Iterator[Item]:
    """WordNet's nouns and what they mean."""
    found = []
    for line in (root / "usr/share/wordnet/data.noun").read_text(encoding="ascii", errors="replace").splitlines():
        head, _, gloss = line.partition(" | ")
        if line[:1].isdigit() and gloss:
            found.append((head.split()[4].replace("_", " "), gloss.split(";")[0].strip()))
    for word, meaning in rng.sample(found, min(number, len(found))):
        yield Item(f'What does "{word}" mean?', meaning, word)


SOURCES = (
    Source(
        "emoji",
        "fonts-noto-color-emoji, unicode-data",
        "OFL-1.1; Unicode licence",
        "Noto Color Emoji, emoji-test.txt",
        900,
        make_emoji,
    ),
    Source("flags", "iso-flags-png-320x240, iso-codes", "public domain; LGPL-2.1+", "iso-flags", 250, make_flags),
    Source("definitions", "wordnet-base", "WordNet 3.0", "WordNet", 1000, make_definitions),
)
