"""The forms that an input sample may have, as a table, and what each becomes: the conversation of our shards.

| form         | fields                                                   | becomes                                      |
|--------------|----------------------------------------------------------|----------------------------------------------|
| conversation | `conversations`, `conversation` or `messages`            | its turns (LLaVA's, ShareGPT's, OpenAI's)    |
| Cauldron     | `texts`, each with `user` and `assistant`                | a user's turn and an answer of each          |
| query        | `query`, `response`, `history` (ms-swift)                | the history's turns, the query, the response |
| instruction  | `instruction`, `input`, `output`, `history` (Alpaca)     | the same; the input stands after a newline   |
| question     | `question` and `answer` or `answers`                     | one user's turn, one answer                  |
| caption      | `caption`, or `text` beside an image                     | the caption prompt, the caption              |
| text         | `text` without an image                                  | one answer without a question                |

Of several `answers`, texts or VQA's `{"answer": ...}`, the commonest is taken (the first of equals), unless there is a
`multiple_choice_answer`: our choice. An instruction and its input are joined by a newline, as in LLaMA-Factory.

Images are named by `image` (a path or a list of paths), `images` or `file_name` of the sample or of a user's turn, by the
parts of an OpenAI message, by Qwen-VL's `<img>path</img>`, or stand in the same WebDataset sample. Each stands where a turn
of the user says `<image>`; those that a turn names stand in it, and if no turn says where, all stand at the beginning of the
first question. A field `system` is the system turn. Fields that are null are absent.

A sample whose fields tell turns twice (`messages` beside `conversations`, `question` beside either, `caption` beside `text`)
is refused, unless they tell the same: none of them may win in silence.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_nvlm.data.building.pictures import (
    FILE_NAME_FIELDS,
    IMAGE_FIELDS,
    has_image_name,
    is_embedded,
    join_pictures,
    listed_pictures,
    picture_path,
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
    answers: tuple[str, ...]
    """Fields of its answer, if that is no part of `fields`."""
    further: tuple[str, ...]
    """Fields that it reads beside these."""
    needs_image: bool | None
    """True or false where the form is only this with or without an image; None if it is either way."""
    turns: Callable[[Content, str], Any]

    def is_told_by(self, content: Content) -> bool:
        """Whether the fields tell this form, be it with or without an image."""
        return any(content.get(field) is not None for field in self.fields)


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


def _cauldron(content: Content, prompt: str) -> Any:
    pairs = content["texts"]
    if not isinstance(pairs, list) or not all(isinstance(pair, Mapping) for pair in pairs):
        raise UserError("its 'texts' is no list of entries with 'user' and 'assistant'")
    return [
        turn for pair in pairs for turn in (_human(_first_text(pair, "user")), _gpt(_first_text(pair, "assistant")))
    ]


def _history(content: Content) -> list[StoredTurn]:
    pairs = content.get("history", [])
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError("its 'history' is no list of pairs [question, answer]")
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise UserError("its 'history' holds what is no text")
    return [turn for asked, answered in pairs for turn in (_human(asked), _gpt(answered))]


def _query(content: Content, prompt: str) -> Any:
    return [*_history(content), _human(_first_text(content, "query")), *_answer(content, "response")]


def _instruction(content: Content, prompt: str) -> Any:
    asked = _first_text(content, "instruction")
    beside = content.get("input", "")
    if not isinstance(beside, str):
        raise UserError("its 'input' is no text")
    asked = f"{asked}\n{beside}" if beside.strip() else asked
    return [*_history(content), _human(asked), *_answer(content, "output")]


def _answer(content: Content, field: str) -> list[StoredTurn]:
    """The answer's turn; none where the field is absent, as in a question that is to be answered."""
    return [_gpt(_first_text(content, field))] if field in content else []


def _question(content: Content, prompt: str) -> Any:
    answer = next((content[field] for field in _QUESTION_ANSWERS if field in content), None)
    if isinstance(answer, list) and answer:
        texts = [one.get("answer") if isinstance(one, Mapping) else one for one in answer]
        if all(isinstance(text, str) for text in texts):
            answer = Counter(texts).most_common(1)[0][0]
    return [
        _human(_first_text(content, "question")),
        *([] if answer is None else [_gpt(_first_text({"answer": answer}, "answer"))]),
    ]


_QUESTION_ANSWERS = ("multiple_choice_answer", "answer", "answers")


def _caption(content: Content, prompt: str) -> list[StoredTurn]:
    said = {value.strip() for value in map(content.get, ("caption", "text")) if isinstance(value, str)}
    if len(said - {""}) > 1:
        raise UserError("its 'caption' and 'text' both tell what is learned, and differ; leave one out")
    return [_human(prompt), _gpt(_first_text(content, "caption", "text"))]


def _text(content: Content, prompt: str) -> list[StoredTurn]:
    return [_gpt(_first_text(content, "text"))]


FORMS: dict[str, Form] = {
    "conversation": Form(("conversations", "conversation", "messages"), (), (), None, _conversation),
    "Cauldron": Form(("texts",), (), (), None, _cauldron),
    "query": Form(("query",), ("response",), ("history",), None, _query),
    "instruction": Form(("instruction",), ("output",), ("input", "history"), None, _instruction),
    "question": Form(("question",), _QUESTION_ANSWERS, (), None, _question),
    "caption": Form(("caption", "text"), (), (), True, _caption),
    "text": Form(("text",), (), (), False, _text),
}
TEXT_FIELDS = frozenset(
    {"id", "source", "system"}.union(*((*form.fields, *form.answers, *form.further) for form in FORMS.values()))
)
"""Fields of texts and turns, and those that name a sample."""
_READ_OF_ALL = ("id", "source", "system", *IMAGE_FIELDS)
"""Fields that decide something in any form; others than these and its own are counted in the report."""


def to_conversation(content: Content, num_images: int, caption_prompt: str) -> list[StoredTurn]:
    """The turns of a sample, with one placeholder for each of its images.

    Raises:
        UserError: it has no known form, placeholders and images differ in number, it names a picture that is not there, or
            a turn must not be learned.
    """
    content = present(content)
    _refuse_competitors(content)
    if num_images == 0:
        refuse_unread_picture(content, TEXT_FIELDS)
    form = FORMS[find_form(content, num_images)]
    if form.answers and not any(field in content for field in form.answers):
        raise UserError(f"it has no {' or '.join(map(repr, form.answers))}, so there is nothing to learn")
    turns = spell_turns(form.turns(content, caption_prompt)).turns
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
    asking = [form for form in FORMS.values() if form.needs_image is None and form.is_told_by(content)]
    if len(asking) != 1:
        wanted = " or ".join(repr(form.fields[0]) for form in FORMS.values() if form.needs_image is None)
        raise UserError(f"it needs one of {wanted}, and has {'none' if not asking else 'several'} of these; correct it")
    _refuse_competitors(content)
    images = image_sources(content)
    if not images:
        refuse_unread_picture(content, TEXT_FIELDS)
    turns = spell_turns(asking[0].turns(_without_answers(content, asking[0]), "")).turns
    _add_system(turns, content)
    _match_places(turns, len(images))
    return turns, images


def _refuse_competitors(content: Content) -> None:
    """Refuse fields that tell turns of their own beside others that do, unless they are the same turns.

    Raises:
        UserError: naming the fields.
    """
    asking = [form for form in FORMS.values() if form.needs_image is None]
    told = {field: form for form in asking for field in form.fields if content.get(field)}
    if len(told) < 2:
        return
    spelled = []
    for field, form in told.items():
        alone = {name: value for name, value in content.items() if name == field or name not in told}
        spelled.append(spell_turns(form.turns(alone, "")))
    if any(one != spelled[0] for one in spelled):
        names = " and ".join(map(repr, told))
        raise UserError(f"its {names} tell turns each, and these differ; leave all but one out")


def _match_places(turns: list[StoredTurn], num_images: int) -> None:
    """All pictures stand in front where the turns do not say where."""
    placeholders = sum(turn.num_images for turn in read_turns({"conversation": turns}))
    if placeholders == 0 and num_images:
        _place_images(turns, num_images)
    elif placeholders != num_images:
        raise UserError(f"its text has {placeholders} {IMAGE_PLACEHOLDER} and it has {num_images} images")


def has_form(content: Content) -> bool:
    """Whether any field tells a form."""
    return any(form.is_told_by(content) for form in FORMS.values())


def unread_fields(content: Content, kept: Sequence[str]) -> list[str]:
    """Fields that decide nothing and are not kept."""
    told = next((form for form in FORMS.values() if form.is_told_by(content)), None)
    own = (*told.fields, *told.answers, *told.further) if told else ()
    read = {*_READ_OF_ALL, *own}.union(
        kept, *(FILE_NAME_FIELDS for name in FILE_NAME_FIELDS if _names_image(content.get(name)))
    )
    return [field for field in present(content) if field not in read]


def _names_image(value: Any) -> bool:
    return isinstance(value, str) and has_image_name(value)


def find_form(content: Content, num_images: int) -> str:
    """The name of a sample's form; the first of the table that fits.

    Args:
        content: without fields that are null.

    Raises:
        UserError: none fits.
    """
    for name, form in FORMS.items():
        if form.is_told_by(content) and form.needs_image in (None, num_images > 0):
            return name
    wanted = ", ".join(dict.fromkeys(field for form in FORMS.values() for field in form.fields))
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
    _refuse_competitors(content)
    told: list[Any] = []
    for form in FORMS.values():
        if form.needs_image is None and form.is_told_by(content):
            told = spell_turns(form.turns(_without_answers(content, form), "")).pictures
            break
    return join_pictures(told, listed_pictures(content), "its turns name")


def _without_answers(content: Content, form: Form) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in form.answers}


def image_sources(content: Content) -> list[str | bytes]:
    """A sample's images, in order, each the path of a file or its content; none for text.

    Raises:
        UserError: its images are named by something else.
    """
    return [picture_source(one) for one in image_names(content)]


def image_files(content: Content) -> list[str]:
    """Paths of those images that stand in files of their own; nothing is decoded.

    Raises:
        UserError: an image is named by something else.
    """
    return [picture_path(one) for one in image_names(content) if not is_embedded(one)]
