"""Demo material from PyPI packages: pages to read, charts, photographs, digits, shapes, and text tasks."""

import importlib
import inspect
import json
import random
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_nvlm.data.building.material import Item, Source

_MODULES = (
    "argparse array ast base64 bisect calendar cmath collections configparser contextlib copy csv dataclasses datetime "
    "decimal difflib enum fractions functools glob gzip hashlib heapq inspect io itertools json logging math operator os "
    "pathlib pickle queue random re shlex shutil socket statistics string struct subprocess tarfile tempfile textwrap "
    "threading time timeit tokenize traceback types typing urllib.parse uuid weakref zipfile zlib"
).split()
_PHOTOGRAPHS = {
    # file of scikit-image -> a caption written by us, and its licence as the package's docstrings give it
    "astronaut.png": (
        "An astronaut in an orange suit in front of a flag and a model of a shuttle.",
        "public domain (NASA)",
    ),
    "chelsea.png": ("A tabby cat looks straight into the camera.", "CC0"),
    "coffee.png": ("A cup of coffee on a saucer with a spoon, seen from the side.", "CC0"),
    "rocket.jpg": ("A rocket stands on its launch pad between tall lightning towers.", "CC0 (SpaceX)"),
    "hubble_deep_field.jpg": ("Many distant galaxies on a black sky.", "public domain (NASA)"),
    "coins.png": ("Old coins lie in rows, in shades of grey.", "no known restriction (Brooklyn Museum)"),
    "brick.png": ("A wall of bricks, in shades of grey.", "CC0"),
    "grass.png": ("A lawn seen from above, in shades of grey.", "CC0"),
    "gravel.png": ("Gravel seen from above, in shades of grey.", "CC0"),
}
_CHART_WORDS = "north south east west spring summer autumn winter tea coffee rice bread books maps lamps chairs".split()
_COLOURS = {"red": (205, 70, 60), "green": (70, 150, 80), "blue": (70, 105, 190), "orange": (225, 145, 50)}
_TEXT_TASKS = (
    "basic_arithmetic chain_sum gcd leg_counting letter_counting simple_equations spell_backward word_sorting gsm_symbolic"
).split()


def docstrings() -> list[tuple[str, str]]:
    """(name, first paragraph) of the standard library's classes and functions, the same on every run."""
    found: dict[str, str] = {}
    for module_name in _MODULES:
        module = importlib.import_module(module_name)
        for name, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if inspect.isfunction(value) or inspect.isclass(value) else None
            paragraph = " ".join((text or "").split("\n\n")[0].split())
            if not name.startswith("_") and 40 <= len(paragraph) <= 400 and paragraph.isascii():
                found.setdefault(paragraph, f"{module_name}.{name}")
    return sorted((name, paragraph) for paragraph, name in found.items())


def make_pages(rng: random.Random, number: int, root: Path) -> Iterator[Item]:
    """Paragraphs drawn as pages of several shapes, to be read aloud."""
    texts = docstrings()
    for _ in range(number):
        name, text = rng.choice(texts)
        width, size = rng.choice((300, 448, 700, 1000)), rng.choice((16, 20, 26))
        face = ImageFont.load_default(size)
        lines = textwrap.wrap(text, max(12, int(width / (size * 0.56))))
        paper, ink = rng.choice(
            (((255, 255, 255), (20, 20, 20)), ((250, 240, 215), (50, 35, 20)), ((35, 40, 60), (235, 235, 235)))
        )
        page = Image.new("RGB", (width, int(len(lines) * size * 1.4) + 40), paper)
        draw = ImageDraw.Draw(page)
        for line, words in enumerate(lines):
            draw.text((20, 20 + int(line * size * 1.4)), words, ink, face)
        yield Item("What does the page say?", " ".join(lines), name, page)


def make_charts(rng: random.Random, number: int, root: Path) -> Iterator[Item]:
    """Bar charts with one question each."""
    face = ImageFont.load_default(16)
    for place in range(number):
        names, values = rng.sample(_CHART_WORDS, rng.randrange(3, 7)), rng.sample(range(5, 100), 6)
        colour = rng.choice(sorted(_COLOURS))
        chart = Image.new("RGB", (110 * len(names) + 40, 360), "white")
        draw = ImageDraw.Draw(chart)
        for bar, (name, value) in enumerate(zip(names, values, strict=False)):
            left = 30 + 110 * bar
            draw.rectangle((left, 310 - 2.7 * value, left + 70, 310), fill=_COLOURS[colour])
            draw.text((left + 35, 300 - 2.7 * value), str(value), "black", face, anchor="ms")
            draw.text((left + 35, 335), name, "black", face, anchor="ms")
        draw.line((20, 310, chart.width - 20, 310), "black", 2)
        shown = dict(zip(names, values, strict=False))
        asked = rng.choice(names)
        question, answer = rng.choice(
            (
                (f"What is the value of {asked}?", str(shown[asked])),
                ("Which bar is the highest?", max(shown, key=shown.__getitem__)),
                ("Which bar is the lowest?", min(shown, key=shown.__getitem__)),
                ("How many bars are there?", str(len(shown))),
                ("What colour are the bars?", colour),
            )
        )
        yield Item(question, answer, f"chart {place}", chart)


def make_digits(rng: random.Random, number: int, root: Path) -> Iterator[Item]:
    """Strips of handwritten digits."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    for _ in range(number):
        chosen = rng.sample(range(len(scans.target)), rng.randrange(2, 9))
        strip = np.concatenate([scans.images[one] * 255 / 16 for one in chosen], axis=1).astype(np.uint8)
        scale = rng.choice((6, 10, 16))
        image = Image.fromarray(255 - strip).resize((strip.shape[1] * scale, 8 * scale), Image.Resampling.BICUBIC)
        yield Item("Read the digits.", "".join(str(scans.target[one]) for one in chosen), f"digits {chosen[0]}", image)


def make_photographs(rng: random.Random, number: int, root: Path) -> Iterator[Item]:
    """Photographs of scikit-image and scikit-learn, whole and in crops."""
    from sklearn.datasets import load_sample_images

    pictures = [
        (
            "china",
            "A Chinese temple above a lake, seen between trees.",
            Image.fromarray(load_sample_images().images[0]),
        ),
        ("flower", "An orange dahlia before dark leaves.", Image.fromarray(load_sample_images().images[1])),
    ]
    spec = find_spec("skimage")  # its pictures alone: importing it takes a second
    folder = Path(spec.origin or "").parent / "data" if spec is not None else None
    for name, (caption, _) in _PHOTOGRAPHS.items():
        if folder is not None and (folder / name).is_file():
            pictures.append((name, caption, Image.open(folder / name).convert("RGB")))
    for place in range(number):
        name, caption, picture = pictures[place % len(pictures)]
        if place >= len(pictures):
            width, height = (rng.randrange(side * 3 // 5, side + 1) for side in picture.size)
            left, top = rng.randrange(picture.width - width + 1), rng.randrange(picture.height - height + 1)
            picture = picture.crop((left, top, left + width, top + height))
        yield Item("Describe the image briefly.", caption, name, picture)


def make_shapes(rng: random.Random, number: int, root: Path) -> Iterator[Item]:
    """easy-VQA: coloured shapes, a ready-made question each."""
    spec = find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise ImportError("easy-vqa")
    folder = Path(spec.origin).parent / "data" / "train"
    questions = json.loads((folder / "questions.json").read_text())
    for question, answer, image in rng.sample(questions, min(number, len(questions))):
        with Image.open(folder / "images" / f"{image}.png") as picture:
            yield Item(question.capitalize(), answer, f"shape {image}", picture.convert("RGB"))


def make_reasoning(rng: random.Random, number: int, root: Path) -> Iterator[Item]:
    """reasoning-gym: arithmetic, words, small stories."""
    import reasoning_gym

    share = -(-number // len(_TEXT_TASKS))
    for task in _TEXT_TASKS:
        for entry in reasoning_gym.create_dataset(task, size=share, seed=rng.randrange(1 << 30)):
            yield Item(entry["question"].strip(), str(entry["answer"]), task)


def make_documentation(rng: random.Random, number: int, root: Path) -> Iterator[Item]:
    """What a function of the standard library does."""
    texts = docstrings()
    for name, text in rng.sample(texts, min(number, len(texts))):
        yield Item(f"What is {name} in Python?", text, name)


SOURCES = (
    Source("pages", "Pillow, Python", "PSF-2.0; font CC0", "docstrings in Pillow's Aileron", 1500, make_pages),
    Source("charts", "Pillow", "ours; font CC0", "drawn", 800, make_charts),
    Source("digits", "scikit-learn", "CC-BY-4.0", "UCI, Optical Recognition of Handwritten Digits", 600, make_digits),
    Source(
        "photographs",
        "scikit-learn, scikit-image",
        "CC-BY-2.0 (china, flower); CC0 or public domain (the others)",
        "Flickr: Hiroyuki Takeda, Vultureman; see skimage.data",
        200,
        make_photographs,
    ),
    Source("shapes", "easy-vqa", "MIT", "easy-VQA, train split", 1500, make_shapes),
    Source("reasoning", "reasoning-gym", "Apache-2.0", "generated", 1500, make_reasoning),
    Source("documentation", "Python", "PSF-2.0", "docstrings", 350, make_documentation),
)
