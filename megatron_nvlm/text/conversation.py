"""Conversations to pieces of ids, by templates that are data. What is learned: answers and the token that ends them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.text.tokenizer import Tokenizer

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


@dataclass(frozen=True)
class Template:
    """How turns are spelled. Names in <| |> are special tokens, the rest is text."""

    turn_start: str
    turn_end: str
    after_turn: str
    """Text behind `turn_end`."""
    before_image: str
    after_image: str


TEMPLATES: dict[str, Template] = {
    # Megatron-LM's NVLM example: a newline behind <|im_end|>; tags and wrapper tokenised apart (nvlm tag type)
    "chatml": Template("<|im_start|>", "<|im_end|>", "\n", "<Image>", "</Image>"),
}

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


def encode_conversation(
    turns: Sequence[Turn],
    num_images: int,
    tokenizer: Tokenizer,
    template: str = "chatml",
    system: str | None = DEFAULT_SYSTEM,
    open_answer: bool = False,
) -> list[TextPiece | ImagePiece]:
    """Turns to text and image pieces.

    Args:
        num_images: images of the sample; each stands where the text says `<image>`.
        system: put in front unless the turns begin with a system turn; None for none.
        open_answer: end with the start of an assistant's turn, for the model to write on.

    Raises:
        UserError: placeholders and images differ in number, or the template is unknown.
    """
    if template not in TEMPLATES:
        raise UserError(f"data.template is {template!r}; choose one of {', '.join(TEMPLATES)}")
    form = TEMPLATES[template]
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders != num_images:
        raise UserError(f"its conversation has {placeholders} {IMAGE_PLACEHOLDER} for {num_images} images")
    start, end = [tokenizer.special_id(form.turn_start)], [tokenizer.special_id(form.turn_end)]
    after_turn = tokenizer.encode(form.after_turn)
    if system is not None and turns and turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    pieces: list[TextPiece | ImagePiece] = []
    image = 0
    for turn in turns:
        learned = turn.role == "assistant"
        header = f"{turn.role}\n"
        pieces.append(TextPiece(start, False))
        if learned:  # the header is given, only what follows is written by the model
            pieces.append(TextPiece(tokenizer.encode(header), False))
            header = ""
        parts = turn.text.split(IMAGE_PLACEHOLDER)
        for number, part in enumerate(parts):
            before = form.after_image if number else header
            behind = form.before_image if number < len(parts) - 1 else ""
            pieces.append(TextPiece(tokenizer.encode(before + part + behind), learned))
            if number < len(parts) - 1:
                pieces.append(ImagePiece(image))
                image += 1
        # The newline behind the end is learned too, as in Megatron-LM's example.
        pieces.append(TextPiece(end + after_turn, learned))
    if open_answer:
        pieces.append(TextPiece(start + tokenizer.encode("assistant\n"), False))
    return [piece for piece in pieces if isinstance(piece, ImagePiece) or piece.ids]
