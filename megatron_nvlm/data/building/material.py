"""What the generators of demo material share: one item, and the record of where it comes from."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Item:
    """A picture with a question, or text alone. `origin` is what a split of held-out items would go by."""

    question: str
    answer: str
    origin: str
    image: Image.Image | None = None


@dataclass(frozen=True)
class Source:
    """Items of one kind. `make(rng, number, root)` gives at most `number` and raises ImportError or FileNotFoundError
    where its package is not installed; `root` is / but for tests."""

    name: str
    package: str
    """pip or apt name."""
    licence: str
    origin: str
    number: int
    """Items at scale 1."""
    make: Callable[[random.Random, int, Path], Iterator[Item]]
