"""The forms that an input sample may have, as a table, and what each becomes: the conversation of our shards.

| form         | fields                                                   | becomes                                      |
|--------------|----------------------------------------------------------|----------------------------------------------|
| conversation | `conversations`, `conversation` or `messages`            | its turns (LLaVA's, ShareGPT's, OpenAI's)    |
| question     | `question` and `answer` (of a list, the commonest)       | one user's turn, one answer                  |
| caption      | `caption`, or `text` beside an image                     | the caption prompt, the caption              |
| text         | `text` without an image                                  | one answer without a question                |

Images are named by `image` (a path or a list of paths), `images` or `file_name` of the sample or of a user's turn, by the
parts of an OpenAI message, by Qwen-VL's `<img>path</img>`, or stand in the same WebDataset sample. Each stands where a turn
of the user says `<image>`; those that a turn names stand in it, and if no turn says where, all stand at the beginning of the
first question. A field `system` is the system turn. Fields that are null are absent.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_nvlm.data.building.pictures import (
    FILE_NAME_FIELDS,
    IMAGE_FIELDS,
    has_image_name,
    join_pictures,
    listed_pictures,
    picture_source,
    present,
    refuse_unread_picture,
    tagged_picture,
)
from megatron_nvlm.data.building.text import shown
from megatron_nvlm.data.building.turns import BYTE_ORDER_MARK, StoredTurn, spell_turns
from megatron_nvlm.errors import UserError
from megatron_nvlm.text.conversation import IMAGE_PLACEHOLDER, check_turns, read_turns

Content = Mapping[str, Any]
DEFAULT_CAPTION_PROMPT = "Describe the image briefly."


@dataclass(frozen=True)
class Form:
    """What a sample of this form has, and how its turns are read: (content, caption prompt) -> turns."""

    fields: tuple[str, ...]
    """Any of them tells the form."""
    needs_image: bool | None
    """True or false where the form is only this with or without an image; None if it is either way."""
    turns: Callable[[Content, str], Any]


def _human(text: str) -> StoredTurn:
    return {"from": "human", "value": text}


def _gpt(text: str) -> StoredTurn:
    return {"from": "gpt", "value": text}


def _first_text(content: Content, *fields: str) -> str:
    for field in fields:
        value = content.get(field)
        if isinstance(value, str) and value.strip(f"{BYTE_ORDER_MARK} \t\r\n"):
            return value.strip().removeprefix(BYTE_ORDER_MARK).strip()
    raise UserError(f"its {' or '.join(repr(field) for field in fields)} is empty or no text")


def _conversation(content: Content, prompt: str) -> Any:
    return _raw_turns(content)


def _raw_turns(content: Content) -> Any:
    """The turns as they stand there; None if there are none."""
    return next((content[field] for field in FORMS["conversation"].fields if content.get(field) is not None), None)


def _question(content: Content, prompt: str) -> list[StoredTurn]:
    answer = content.get("answer", content.get("answers"))
    if isinstance(answer, list) and answer and all(isinstance(one, str) for one in answer):
        answer = Counter(answer).most_common(1)[0][0]
    return [_human(_first_text(content, "question")), _gpt(_first_text({"answer": answer}, "answer"))]


def _caption(content: Content, prompt: str) -> list[StoredTurn]:
    return [_human(prompt), _gpt(_first_text(content, "caption", "text"))]


def _text(content: Content, prompt: str) -> list[StoredTurn]:
    return [_gpt(_first_text(content, "text"))]


FORMS: dict[str, Form] = {
    "conversation": Form(("conversations", "conversation", "messages"), None, _conversation),
    "question": Form(("question",), None, _question),
    "caption": Form(("caption", "text"), True, _caption),
    "text": Form(("text",), False, _text),
}


TEXT_FIELDS = frozenset(
    {"id", "source", "system", "answer", "answers", *(name for form in FORMS.values() for name in form.fields)}
)
"""Fields of texts and turns, and those that name a sample."""
READ_FIELDS = TEXT_FIELDS.union(IMAGE_FIELDS)
"""Fields that decide something; others are counted in the report."""


def to_conversation(content: Content, num_images: int, caption_prompt: str) -> list[StoredTurn]:
    """The turns of a sample, with one placeholder for each of its images.

    Raises:
        UserError: it has no known form, placeholders and images differ in number, it names a picture that is not there, or
            a turn must not be learned.
    """
    content = present(content)
    if num_images == 0:
        refuse_unread_picture(content, TEXT_FIELDS)
    turns = spell_turns(_find_form(content, num_images).turns(content, caption_prompt)).turns
    _add_system(turns, content)
    check_turns(read_turns({"conversation": turns}))
    _match_places(turns, num_images)
    return turns


def to_question(content: Content) -> tuple[list[StoredTurn], list[str | bytes]]:
    """The turns of a question that is to be answered, and its pictures (path or content), one placeholder for each.

    Raises:
        UserError: it is no question, pictures are named in another way, or placeholders and pictures differ in number.
    """
    content = present(content)
    raw, question = _raw_turns(content), content.get("question")
    if isinstance(question, str) == (raw is not None):
        raise UserError("it needs either 'question', a text, or 'conversation', a list of turns")
    images = image_sources(content)
    if not images:
        refuse_unread_picture(content, TEXT_FIELDS)
    turns = spell_turns([_human(question)] if isinstance(question, str) else raw).turns
    _add_system(turns, content)
    _match_places(turns, len(images))
    return turns, images


def _match_places(turns: list[StoredTurn], num_images: int) -> None:
    """All pictures stand in front where the turns do not say where."""
    placeholders = sum(turn.num_images for turn in read_turns({"conversation": turns}))
    if placeholders == 0 and num_images:
        _place_images(turns, num_images)
    elif placeholders != num_images:
        raise UserError(f"its text has {placeholders} {IMAGE_PLACEHOLDER} and it has {num_images} images")


def has_form(content: Content) -> bool:
    """Whether any field tells a form."""
    return any(content.get(field) is not None for form in FORMS.values() for field in form.fields)


def unread_fields(content: Content, kept: Sequence[str]) -> list[str]:
    """Fields that decide nothing and are not kept."""
    read = READ_FIELDS.union(kept, *(FILE_NAME_FIELDS for name in FILE_NAME_FIELDS if _names_image(content.get(name))))
    return [field for field in present(content) if field not in read]


def _names_image(value: Any) -> bool:
    return isinstance(value, str) and has_image_name(value)


def _find_form(content: Content, num_images: int) -> Form:
    for form in FORMS.values():
        if any(field in content for field in form.fields) and form.needs_image in (None, num_images > 0):
            return form
    wanted = ", ".join(field for form in FORMS.values() for field in form.fields)
    there = ", ".join(map(str, content))[:200] or "none"
    image = "" if num_images else " and no picture"
    raise UserError(f"it has none of the fields that tell a form ({wanted}); it has {there}{image}")


def _add_system(turns: list[StoredTurn], content: Content) -> None:
    """Put the field `system` in front, where the conversation has no system turn."""
    said = content.get("system", "")
    if not isinstance(said, str):
        raise UserError("its 'system' is no text")
    named = tagged_picture(said)
    if named is not None:
        raise UserError(f"its 'system' names the picture {shown(named)} outside a user's turn; move it there")
    said = said.removeprefix(BYTE_ORDER_MARK)
    if not said.strip():
        return
    if turns[0]["from"] != "system":
        turns.insert(0, {"from": "system", "value": said})
    elif turns[0]["value"] != said:
        raise UserError("its 'system' and its conversation's system turn differ; leave one out")


def _place_images(turns: list[StoredTurn], num_images: int) -> None:
    placeholders = f"{IMAGE_PLACEHOLDER}\n" * num_images
    for turn in turns:
        if turn["from"] == "human":
            turn["value"] = placeholders + turn["value"]
            return
    place = 1 if turns[0]["from"] == "system" else 0
    turns.insert(place, _human(placeholders.rstrip("\n")))


def image_names(content: Content) -> list[Any]:
    """What a sample says of its images, in order: paths, or descriptions without one.

    Raises:
        UserError: two of its places name different pictures.
    """
    content = present(content)
    raw, question = _raw_turns(content), content.get("question")
    if raw is None:
        raw = [_human(question)] if isinstance(question, str) else []
    told = spell_turns(raw).pictures if raw else []
    return join_pictures(told, listed_pictures(content), "its turns name")


def image_sources(content: Content) -> list[str | bytes]:
    """A sample's images, in order, each the path of a file or its content; none for text.

    Raises:
        UserError: its images are named by something else.
    """
    return [picture_source(one) for one in image_names(content)]
