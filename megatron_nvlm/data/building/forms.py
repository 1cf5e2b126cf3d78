"""The forms that an input sample may have, as a table, and what each becomes: the conversation of our shards.

| form         | fields                                                   | becomes                                      |
|--------------|----------------------------------------------------------|----------------------------------------------|
| conversation | `conversations`, `conversation` or `messages`            | its turns (LLaVA's, ShareGPT's, OpenAI's)    |
| question     | `question` and `answer` (of a list, the commonest)       | one user's turn, one answer                  |
| caption      | `caption`, or `text` beside an image                     | the caption prompt, the caption              |
| text         | `text` without an image                                  | one answer without a question                |

Images are named by `image` (a path or a list of paths) or `images`, or stand in the same WebDataset sample. If there are
images and no turn says where, they stand at the beginning of the first question.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.text.conversation import IMAGE_PLACEHOLDER, read_turns

Content = Mapping[str, Any]
DEFAULT_CAPTION_PROMPT = "Describe the image briefly."


@dataclass(frozen=True)
class Form:
    """What a sample of this form has, and how its turns are read: (content, caption prompt) -> turns."""

    fields: tuple[str, ...]
    """Any of them tells the form."""
    needs_image: bool | None
    """True or false where the form is only this with or without an image; None if it is either way."""
    turns: Callable[[Content, str], list[dict[str, str]]]


def _human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def _gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def _first_text(content: Content, *fields: str) -> str:
    for field in fields:
        value = content.get(field)
        if isinstance(value, str) and value.strip():
            return value.strip()
    raise UserError(f"its {' or '.join(repr(field) for field in fields)} is empty or no text")


def _conversation(content: Content, prompt: str) -> list[dict[str, str]]:
    raw = next(content[field] for field in FORMS["conversation"].fields if field in content)
    if not isinstance(raw, list):
        raise UserError("its conversation is no list of turns")
    plain = [_plain_turn(turn) for turn in raw]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[turn.role], "value": turn.text} for turn in read_turns({"conversation": plain})]


def _plain_turn(turn: Any) -> Any:
    """A turn whose content is a list of parts (OpenAI's form), as one text."""
    content = turn.get("content") if isinstance(turn, Mapping) else None
    if not isinstance(content, list):
        return turn
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("image", "image_url"):
            texts.append(IMAGE_PLACEHOLDER)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise UserError(f"a part of type {kind!r} in its conversation is neither text nor image")
    return {"role": turn.get("role"), "content": "\n".join(texts)}


def _question(content: Content, prompt: str) -> list[dict[str, str]]:
    answer = content.get("answer", content.get("answers"))
    if isinstance(answer, list) and answer and all(isinstance(one, str) for one in answer):
        answer = Counter(answer).most_common(1)[0][0]
    return [_human(_first_text(content, "question")), _gpt(_first_text({"answer": answer}, "answer"))]


def _caption(content: Content, prompt: str) -> list[dict[str, str]]:
    return [_human(prompt), _gpt(_first_text(content, "caption", "text"))]


def _text(content: Content, prompt: str) -> list[dict[str, str]]:
    return [_gpt(_first_text(content, "text"))]


FORMS: dict[str, Form] = {
    "conversation": Form(("conversations", "conversation", "messages"), None, _conversation),
    "question": Form(("question",), None, _question),
    "caption": Form(("caption", "text"), True, _caption),
    "text": Form(("text",), False, _text),
}


def to_conversation(content: Content, num_images: int, caption_prompt: str) -> list[dict[str, str]]:
    """The turns of a sample, with one placeholder for each of its images.

    Raises:
        UserError: it has no known form, placeholders and images differ in number, or nothing is there to learn.
    """
    turns = _find_form(content, num_images).turns(content, caption_prompt)
    if not any(turn["from"] == "gpt" and turn["value"].strip() for turn in turns):
        raise UserError("it has no answer, so there is nothing to learn")
    placeholders = sum(turn["value"].count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders == 0 and num_images:
        _place_images(turns, num_images)
    elif placeholders != num_images:
        raise UserError(f"its text has {placeholders} {IMAGE_PLACEHOLDER} and it has {num_images} images")
    return turns


def _find_form(content: Content, num_images: int) -> Form:
    for form in FORMS.values():
        if any(field in content for field in form.fields) and form.needs_image in (None, num_images > 0):
            return form
    wanted = ", ".join(field for form in FORMS.values() for field in form.fields)
    raise UserError(f"it has none of the fields that tell a form ({wanted})")


def _place_images(turns: list[dict[str, str]], num_images: int) -> None:
    placeholders = f"{IMAGE_PLACEHOLDER}\n" * num_images
    for turn in turns:
        if turn["from"] == "human":
            turn["value"] = placeholders + turn["value"]
            return
    place = 1 if turns[0]["from"] == "system" else 0
    turns.insert(place, _human(placeholders.rstrip("\n")))


def image_paths(content: Content) -> list[str]:
    """Paths of a sample's images, in order; none for text.

    Raises:
        UserError: `image` or `images` holds something else than paths.
    """
    raw = content.get("image", content.get("images"))
    if raw is None or raw == "":
        return []
    paths = [one.get("path") if isinstance(one, Mapping) else one for one in (raw if isinstance(raw, list) else [raw])]
    if not all(isinstance(path, str) and path for path in paths):
        raise UserError("its 'image' is neither a path nor a list of paths")
    return [str(path) for path in paths]
