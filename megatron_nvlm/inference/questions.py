"""Questions as stored samples: one alone, or the turns of a conversation that goes on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_nvlm.data.shards.records import RawSample
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import decode_image
from megatron_nvlm.regular_files import read_whole
from megatron_nvlm.text.conversation import IMAGE_PLACEHOLDER


def with_images(question: str, num_images: int) -> str:
    """The question with a place for each image: in front, unless it says where with `<image>`."""
    return question if IMAGE_PLACEHOLDER in question else f"{IMAGE_PLACEHOLDER}\n" * num_images + question


def make_sample(key: str, turns: Sequence[dict[str, str]], images: Sequence[bytes]) -> RawSample:
    """A conversation as a stored sample, its images whole."""
    record = {"conversation": list(turns), "images": [{} for _ in images]}
    return RawSample(key, record, {f"{number}.image": image for number, image in enumerate(images)})


def read_image(path: Path, place: str = "") -> bytes:
    """An image file's bytes; UserError if it cannot be read.

    Args:
        place: what the sentence calls it; its path if empty.
    """
    return read_whole(path, f"the image {place or path}")


def read_picture(path: Path) -> bytes:
    """An image file's bytes, seen to be a picture; UserError that names the file otherwise."""
    data = read_image(path)
    try:
        decode_image(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return data


@dataclass
class Conversation:
    """What was said so far; the next question is read with all of it."""

    turns: list[dict[str, str]] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)

    def ask(self, question: str, images: Sequence[bytes] = ()) -> RawSample:
        """The conversation with one question more, to be answered; it is not yet part of it."""
        self._asked = [{"from": "human", "value": with_images(question, len(images))}], list(images)
        turns, new = self._asked
        return make_sample(f"turn {len(self.turns)}", [*self.turns, *turns], [*self.images, *new])

    def answered(self, text: str) -> None:
        """Keep the question that was asked last, and its answer."""
        turns, images = self._asked
        self.turns += [*turns, {"from": "gpt", "value": text}]
        self.images += images
