"""Batches that layouts can get wrong: a kind is one row of `BATCH_KINDS`, the micro-batches of one step.

Text has ids below `FIRST_TAG_ID`, tile tags at or above it, so that a test can tell the embeddings of tags.
"""

from collections.abc import Callable

import numpy as np
import torch

from tests.support.tiny import ImageRun, PlainSample, TextRun

FIRST_TAG_ID = 900
MICRO_BATCHES = 4
"""Of a step, over all replicas."""

MicroBatchSamples = list[PlainSample]


class Draw:
    """Random runs of a step, the same in every process."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def text(self, length: int, is_target: bool = False) -> TextRun:
        """Ids of words."""
        return TextRun(self.rng.integers(5, FIRST_TAG_ID, length).tolist(), is_target)

    def image(self, num_tiles: int) -> ImageRun:
        """Regular tiles and a thumbnail; one tile is its own thumbnail."""
        pictures = num_tiles + (num_tiles > 1)
        tiles = torch.from_numpy(self.rng.integers(0, 256, (pictures, 3, 56, 56), dtype=np.uint8))
        return ImageRun(
            tiles, [self.rng.integers(FIRST_TAG_ID, 1000, 2 + number % 2).tolist() for number in range(pictures)]
        )

    def words(self) -> PlainSample:
        """A sample without images."""
        return PlainSample((self.text(6), self.text(5, True)))

    def picture(self, num_tiles: int, target: bool = True) -> PlainSample:
        """A question about one image."""
        return PlainSample((self.text(3), self.image(num_tiles), self.text(4), self.text(5, target)))

    def two_pictures(self) -> PlainSample:
        """A question about two images, with an answer in two parts."""
        runs = (self.text(5), self.image(3), self.text(4), self.image(2), self.text(3), self.text(6, True))
        return PlainSample((*runs, self.text(2), self.text(3, True)))


BATCH_KINDS: dict[str, Callable[[Draw], list[MicroBatchSamples]]] = {
    "text only": lambda d: [[d.words()] for _ in range(MICRO_BATCHES)],
    "images only": lambda d: [[d.picture(tiles)] for tiles in (2, 1, 3, 2)],
    "mixed": lambda d: [[d.words()], [d.picture(2)], [d.words()], [d.picture(3)]],
    "several images": lambda d: [[d.two_pictures()] for _ in range(MICRO_BATCHES)],
    "packed": lambda d: [[d.picture(2), d.words(), d.two_pictures()] for _ in range(MICRO_BATCHES)],
    "one tile": lambda d: [[d.picture(1)] for _ in range(MICRO_BATCHES)],
    "no target": lambda d: [[d.picture(2)], [d.picture(2, target=False)], [d.words()], [d.picture(1, target=False)]],
    # Replicas take every other micro-batch: one of two gets nearly all tiles.
    "uneven tiles": lambda d: [[d.picture(6), d.picture(5)], [d.words()], [d.picture(6)], [d.picture(1)]],
}

# What the steps of a run are made of: one kind again and again, or all of them in turn.
BATCH_RUNS: dict[str, tuple[str, ...]] = {
    **{kind: (kind,) for kind in BATCH_KINDS},
    "alternating": ("uneven tiles", "text only", "no target"),
    "alternating rest": ("packed", "one tile", "several images"),
    "image, text, mixed": ("images only", "text only", "mixed"),
}


def step_samples(run: str, step: int) -> list[MicroBatchSamples]:
    """Samples of the micro-batches of one step of a run."""
    kinds = BATCH_RUNS[run]
    return BATCH_KINDS[kinds[step % len(kinds)]](Draw(1000 + step))
