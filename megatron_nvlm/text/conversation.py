"""Conversations to pieces of ids, by templates that are data. What is learned: answers and the token that ends them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.text.templates import TEMPLATES, Speech, Template
from megatron_nvlm.text.tokenizer import Tokenizer

__all__ = [
    "DEFAULT_SYSTEM",
    "IMAGE_PLACEHOLDER",
    "ROLES",
    "TEMPLATES",
    "ImagePiece",
    "TextPiece",
    "Turn",
    "arrange_turns",
    "check_turns",
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
    is_learned: bool = True
    """False for an answer that is given and not learned; of other roles nothing is learned in any case."""

    @property
    def parts(self) -> list[str]:
        """The text around its images. `<image>` is the place of one in a user's turn alone; elsewhere it is text."""
        return self.text.split(IMAGE_PLACEHOLDER) if self.role == "user" else [self.text]

    @property
    def num_images(self) -> int:
        """Places of images."""
        return len(self.parts) - 1


@dataclass(frozen=True)
class TextPiece:
    """Ids of text; `is_target` where the model learns to write them."""

    ids: list[int]
    is_target: bool


@dataclass(frozen=True)
class ImagePiece:
    """The place of an image, by its number in the sample."""

    image_index: int


ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""What users' files call the speakers, and what the templates do."""
_LEARNING_FIELDS = ("loss", "weight", "train")
"""Fields by which a turn says whether it is learned: ms-swift's, OpenAI's and Axolotl's."""


def read_turns(record: Mapping[str, Any]) -> list[Turn]:
    """The turns of a sample's JSON: `conversation` (or `conversations`), each with `from`/`value` or `role`/`content`.

    A turn with `loss`, `weight` or `train` of false or 0 is not learned. A field that is null is absent.

    Raises:
        UserError: there is no conversation, or a turn is not of that form.
    """
    raw = record.get("conversation", record.get("conversations"))
    if not isinstance(raw, list) or not raw:
        raise UserError("its JSON has no conversation; expected a list under the key 'conversation'")
    turns = []
    for number, item in enumerate(raw):
        fields = item if isinstance(item, Mapping) else {}
        role, text = _present(fields, "from", "role"), _present(fields, "value", "content")
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            said = f", and its 'from' is {role[:40]!r}" if isinstance(role, str) and role not in ROLES else ""
            raise UserError(
                f"turn {number} of its conversation needs 'from' (one of {', '.join(ROLES)}) and 'value'{said}"
            )
        turns.append(Turn(ROLES[role], text, _is_learned(fields, number)))
    return turns


def _present(fields: Mapping[str, Any], *names: str) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _is_learned(fields: Mapping[str, Any], number: int) -> bool:
    said = {name: fields[name] for name in _LEARNING_FIELDS if fields.get(name) is not None}
    for name, value in said.items():
        if value not in (0, 1):  # true and false are equal to these
            raise UserError(f"turn {number} of its conversation has {name!r} {value!r}; it must be true, false, 1 or 0")
    return all(said.values())


def check_places(turns: Sequence[Turn]) -> None:
    """Refuse `<image>` outside a user's turn: no model is to learn to write it.

    Raises:
        UserError: naming the turn.
    """
    for number, turn in enumerate(turns):
        if turn.role != "user" and IMAGE_PLACEHOLDER in turn.text:
            raise UserError(
                f"turn {number} of its conversation, of the {turn.role}, says {IMAGE_PLACEHOLDER}, which is the place of "
                "an image and stands in a user's turn alone; move it there or write it otherwise"
            )


def check_turns(turns: Sequence[Turn]) -> None:
    """Refuse turns that must not be learned: no answer, an empty one, `<image>` outside a user's turn.

    Raises:
        UserError: naming the turn.
    """
    check_places(turns)
    learned = [(number, turn) for number, turn in enumerate(turns) if turn.role == "assistant" and turn.is_learned]
    if not any(turn.text.strip() for _, turn in learned):
        raise UserError("it has no answer, so there is nothing to learn")
    for number, turn in learned:
        if not turn.text.strip():
            raise UserError(
                f"turn {number} of its conversation is an empty answer, by which only the end would be learned; "
                "write one, leave the turn out or give it 'loss': false"
            )


def find_template(name: str) -> Template:
    """A row of the table; UserError if there is none of this name."""
    if name not in TEMPLATES:
        raise UserError(f"data.template is {name!r}; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def arrange_turns(turns: Sequence[Turn], form: Template) -> list[Turn]:
    """The turns that a template spells, with the words as they stand in them.

    Raises:
        UserError: the template has no place for a system turn that is there.
    """
    if form.system_joint and turns and turns[0].role == "system":
        system, *turns = turns
        if IMAGE_PLACEHOLDER in system.text or not turns or turns[0].role != "user":
            raise UserError(
                "its system turn stands in the first user's turn by this template; let a user's turn follow, and no "
                f"{IMAGE_PLACEHOLDER} be in it"
            )
        turns = [replace(turns[0], text=f"{system.text}{form.system_joint}{turns[0].text}"), *turns[1:]]
    if form.system_joint and any(turn.role == "system" for turn in turns):
        raise UserError("it has a system turn after its first turn, for which this template has no place")
    arranged = []
    for turn in turns:
        speech = form.roles[turn.role]
        words = turn.text.strip() if speech.strips else turn.text
        arranged.append(replace(turn, text=f"{speech.lead}{words}"))
    return arranged


def encode_conversation(
    turns: Sequence[Turn],
    num_images: int,
    tokenizer: Tokenizer,
    form: Template,
    system: str | None = DEFAULT_SYSTEM,
    open_answer: bool = False,
    first_tags: Sequence[str] | None = None,
) -> list[TextPiece | ImagePiece]:
    """Turns to text and image pieces.

    Args:
        num_images: images of the sample; each stands where a user's turn says `<image>`.
        form: the template.
        system: put in front unless the turns begin with a system turn or the template takes none; None for none.
        open_answer: end with the start of an assistant's turn, for the model to write on.
        first_tags: of each image, its first tag in the decoder (sequence/tag_ids.py), for templates that tokenise it with
            the text before; None where only lengths matter, which it does not change.

    Raises:
        UserError: placeholders and images differ in number or `<image>` is to be learned.
    """
    if not open_answer:  # what a model has said already may be anything, and is text
        check_places(turns)
    placeholders = sum(turn.num_images for turn in turns)
    if placeholders != num_images:
        raise UserError(
            f"its conversation has {placeholders} {IMAGE_PLACEHOLDER} for {num_images} images (those in turns of a user "
            "count)"
        )
    if system is not None and form.takes_system and turns and turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    turns = arrange_turns(turns, form)
    tags = iter(first_tags if first_tags is not None else ["<"] * num_images)
    pieces: list[TextPiece | ImagePiece] = [TextPiece(_special(form.begin, tokenizer), False)]
    image = 0
    for turn in turns:
        speech = form.roles[turn.role]
        learned = turn.role == "assistant" and turn.is_learned
        header = speech.header
        pieces += [TextPiece(ids, False) for ids in _marks(speech, tokenizer)]
        if turn.role == "assistant":  # the header is given, only what follows is written by the model
            pieces.append(TextPiece(tokenizer.encode(header), False))
            header = ""
        *parts, last = turn.parts
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
        pieces.append(TextPiece([*chain(*_marks(speech, tokenizer)), *tokenizer.encode(speech.header)], False))
    return [piece for piece in pieces if isinstance(piece, ImagePiece) or piece.ids]


def _marks(speech: Speech, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of what stands before the header."""
    label = tokenizer.encode(speech.label) if speech.label else []
    return [_special(speech.start, tokenizer), label, _special(speech.label_end, tokenizer)]


def _special(name: str, tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.special_id(name)] if name else []
