"""How often a model is right about held-out images, with the images, with their thumbnails alone, and without them."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_nvlm.data.prepare import PreparedSample

BLANK = 128
"""Grey that stands for a picture that is taken away."""


def keep_all(sample: PreparedSample) -> PreparedSample:
    """The sample as it is."""
    return sample


def keep_thumbnails(sample: PreparedSample) -> PreparedSample:
    """Every regular tile grey (of one image: all tiles but the last)."""
    tiles = np.full_like(sample.tiles, BLANK)
    tiles[-1:] = sample.tiles[-1:]
    return dataclasses.replace(sample, tiles=tiles)


def keep_nothing(sample: PreparedSample) -> PreparedSample:
    """Every tile and the thumbnail grey."""
    return dataclasses.replace(sample, tiles=np.full_like(sample.tiles, BLANK))


VIEWS: dict[str, Callable[[PreparedSample], PreparedSample]] = {
    "images": keep_all,
    "thumbnail only": keep_thumbnails,
    "blank": keep_nothing,
}
"""What the model gets to see of an image."""


@dataclass(frozen=True)
class Answer:
    """One question answered."""

    key: str
    view: str
    source: str
    truth: str
    answer: str


def characters_right(truth: str, answer: str, counted: str = r"\S") -> tuple[int, int]:
    """(characters of the truth that the answer has at the same place, characters of the longer text).

    Args:
        counted: pattern of the characters that count; others are left out of both texts.
    """
    expected, given = re.findall(counted, truth), re.findall(counted, answer)
    return sum(a == b for a, b in zip(expected, given, strict=False)), max(len(expected), len(given))


def accuracy(answers: Sequence[Answer], counted: str = r"\S") -> float:
    """Share of characters that are right; 0 without answers."""
    counts = [characters_right(answer.truth, answer.answer, counted) for answer in answers]
    return sum(right for right, _ in counts) / max(sum(length for _, length in counts), 1)


def accuracy_table(answers: Sequence[Answer], counted: str = r"\S") -> dict[str, dict[str, float]]:
    """Share of characters right by view and source, with the source `all` for every one."""
    sources = sorted({answer.source for answer in answers})
    table = {}
    for view in VIEWS:
        of_view = [answer for answer in answers if answer.view == view]
        table[view] = {"all": accuracy(of_view, counted)} | {
            source: accuracy([answer for answer in of_view if answer.source == source], counted) for source in sources
        }
    return table
