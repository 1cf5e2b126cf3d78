"""Conversations to pieces of ids, by templates that are data. What is learned: answers and the token that ends them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.text.templates import TEMPLATES, Template
from megatron_nvlm.text.tokenizer import Tokenizer

__all__ = [
    "DEFAULT_SYSTEM",
    "IMAGE_PLACEHOLDER",
    "TEMPLATES",
    "ImagePiece",
    "TextPiece",
    "Turn",
    "encode_conversation",
    "find_template",
    "read_turns",
]

IMAGE_PLACEHOLDER = "<image>"
DEFAULT_SYSTEM = "Answer the questions."
"""Of the released code; the paper's figure 12 has "Follow the user's instruction and answer questions."."""


@dataclass(frozen=True)
class Turn:
    """What one speaker says; role is system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True)
class TextPiece:
    """Ids of text; `is_target` where the model learns to write them."""

    ids: list[int]
    is_target: bool


@dataclass(frozen=True)
class ImagePiece:
    """The place of an image, by its number in the sample."""

    image_index: int


_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read_turns(record: Mapping[str, Any]) -> list[Turn]:
    """The turns of a sample's JSON: `conversation` (or `conversations`), each with `from`/`value` or `role`/`content`.

    Raises:
        UserError: there is no conversation, or a turn is not of that form.
    """
    raw = record.get("conversation", record.get("conversations"))
    if not isinstance(raw, list) or not raw:
        raise UserError("its JSON has no conversation; expected a list under the key 'conversation'")
    turns = []
    for number, item in enumerate(raw):
        role = item.get("from", item.get("role")) if isinstance(item, Mapping) else None
        text = item.get("value", item.get("content")) if isinstance(item, Mapping) else None
        if role not in _ROLES or not isinstance(text, str):
            raise UserError(f"turn {number} of its conversation needs 'from' (one of {', '.join(_ROLES)}) and 'value'")
        turns.append(Turn(_ROLES[role], text))
    return turns


def find_template(name: str) -> Template:
    """A row of the table; UserError if there is none of this name."""
    if name not in TEMPLATES:
        raise UserError(f"data.template is {name!r}; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def encode_conversation(
    turns: Sequence[Turn],
    num_images: int,
    tokenizer: Tokenizer,
    template: str = "chatml",
    system: str | None = DEFAULT_SYSTEM,
    open_answer: bool = False,
    first_tags: Sequence[str] | None = None,
) -> list[TextPiece | ImagePiece]:
    """Turns to text and image pieces.

    Args:
        num_images: images of the sample; each stands where the text says `<image>`.
        template: a name of templates.py.
        system: put in front unless the turns begin with a system turn or the template takes none; None for none.
        open_answer: end with the start of an assistant's turn, for the model to write on.
        first_tags: of each image, its first tag in the decoder (sequence/tag_ids.py), for templates that tokenise it with
            the text before; None where only lengths matter, which it does not change.

    Raises:
        UserError: placeholders and images differ in number, or the template is unknown.
    """
    form = find_template(template)
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders != num_images:
        raise UserError(f"its conversation has {placeholders} {IMAGE_PLACEHOLDER} for {num_images} images")
    if system is not None and form.takes_system and turns and turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    tags = iter(first_tags if first_tags is not None else ["<"] * num_images)
    pieces: list[TextPiece | ImagePiece] = [TextPiece(_special(form.begin, tokenizer), False)]
    image = 0
    for turn in turns:
        speech = form.roles[turn.role]
        learned = turn.role == "assistant"
        header = speech.header
        pieces.append(TextPiece(_special(speech.start, tokenizer), False))
        if learned:  # the header is given, only what follows is written by the model
            pieces.append(TextPiece(tokenizer.encode(header), False))
            header = ""
        *parts, last = turn.text.split(IMAGE_PLACEHOLDER)
        before = header
        for part in parts:
            text = before + part + form.before_image
            ids = tokenizer.encode_joined(text, next(tags))[0] if form.joins_first_tag else tokenizer.encode(text)
            pieces += [TextPiece(ids, learned), ImagePiece(image)]
            image += 1
            before = form.after_image
        pieces.append(TextPiece(tokenizer.encode(before + last), learned))
        pieces.append(TextPiece(_special(speech.end, tokenizer), learned))
        pieces.append(TextPiece(tokenizer.encode(speech.behind), learned and form.learns_behind))
    if open_answer:
        speech = form.roles["assistant"]
        pieces.append(TextPiece(_special(speech.start, tokenizer) + tokenizer.encode(speech.header), False))
    return [piece for piece in pieces if isinstance(piece, ImagePiece) or piece.ids]


def _special(name: str, tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.special_id(name)] if name else []
