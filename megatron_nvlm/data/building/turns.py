"""Turns as users' files write them -> turns of our shards, with `<image>` where a picture stands, and what names it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_nvlm.data.building.pictures import (
    IMAGE_FIELDS,
    join_pictures,
    listed_pictures,
    present,
    reference,
    take_image_tags,
)
from megatron_nvlm.errors import UserError
from megatron_nvlm.text.conversation import IMAGE_PLACEHOLDER, ROLES, read_turns

StoredTurn = dict[str, Any]
BYTE_ORDER_MARK = "\ufeff"
"""What Windows' editors put before a text; it is no part of it."""
_STORED_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
_IMAGE_PARTS = ("image", "image_url", "input_image")
"""Kinds of parts of a message that are pictures."""
_PART_NAMES = ("image", "image_url", "path", "url")
"""Keys by which such a part names its picture; with `bytes` it is the picture."""


@dataclass(frozen=True)
class SpelledTurns:
    """Turns as our shards store them."""

    turns: list[StoredTurn]
    pictures: list[Any]
    """What the turns name, in order; a place alone (`<image>`) names nothing."""


def spell_turns(raw: Any) -> SpelledTurns:
    """Turns of any writer, each alike.

    Raises:
        UserError: they are no turns, or one that is not a user's has a picture.
    """
    if not isinstance(raw, list):
        raise UserError("its conversation is no list of turns")
    plain, pictures, places = [], list[Any](), 0
    for number, turn in enumerate(raw):
        text_turn, named = _spell(turn, number, places) if isinstance(turn, Mapping) else (turn, [])
        plain.append(text_turn)
        pictures += named
        places += _places_in(text_turn)
    turns = [
        {"from": _STORED_ROLES[turn.role], "value": turn.text, **({} if turn.is_learned else {"loss": False})}
        for turn in read_turns({"conversation": plain})
    ]
    return SpelledTurns(turns, pictures)


def _places_in(turn: Any) -> int:
    said = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
    return said.count(IMAGE_PLACEHOLDER) if isinstance(said, str) else 0


def _spell(turn: Mapping[str, Any], number: int, places: int) -> tuple[Mapping[str, Any], list[Any]]:
    """A turn as one text, and the pictures that it names.

    Args:
        places: of pictures in the turns before it.
    """
    fields = present(turn)
    for one, other in (("value", "content"), ("from", "role")):
        if one in fields and other in fields and _meaning(fields[one]) != _meaning(fields[other]):
            raise UserError(f"turn {number} of its conversation has {one!r} and {other!r}, which differ; leave one out")
    key = "value" if "value" in fields else "content"
    said = fields.get(key)
    told, has_parts = list[Any](), False
    if isinstance(said, str):
        said, told = take_image_tags(said.removeprefix(BYTE_ORDER_MARK), IMAGE_PLACEHOLDER)
    elif isinstance(said, list):
        said, told, has_parts = _join_parts(said, places)
    own = listed_pictures(fields)
    role = fields.get("from", fields.get("role"))
    if (told or own or has_parts) and not (isinstance(role, str) and ROLES.get(role) == "user"):
        what = f"the picture {_listed(told or own)}" if told or own else "a picture"
        raise UserError(
            f"turn {number} of its conversation, of the {ROLES.get(str(role), role)}, names {what} outside a user's turn; "
            "move it there"
        )
    join_pictures(told, own, f"turn {number} of its conversation names in its text")
    if own and not told and isinstance(said, str):
        said = _place_own(said, len(own), number)
    return {**fields, key: said}, told or own


def _meaning(said: Any) -> Any:
    """A speaker by what the templates call it; a text as it stands."""
    return ROLES.get(said, said) if isinstance(said, str) else said


def _listed(named: list[Any]) -> str:
    path = reference(named[0])
    return repr(str(path)[:80])


def _place_own(said: str, count: int, number: int) -> str:
    """The text of a turn with a place for each of its own pictures: in front, where it does not say where."""
    places = said.count(IMAGE_PLACEHOLDER)
    if places not in (0, count):
        raise UserError(
            f"turn {number} of its conversation has {places} {IMAGE_PLACEHOLDER} and names {count} pictures"
        )
    return said if places else f"{IMAGE_PLACEHOLDER}\n" * count + said


def _join_parts(parts: list[Any], places: int) -> tuple[str, list[Any], bool]:
    """A content of parts (OpenAI's form) as one text, the pictures that it names, and whether any part is one."""
    texts, named, has_pictures = list[str](), list[Any](), False
    for part in parts:
        fields = present(part) if isinstance(part, Mapping) else {}
        kind = fields.get("type")
        if kind in _IMAGE_PARTS:
            has_pictures = True
            _refuse_index(fields, places + texts.count(IMAGE_PLACEHOLDER))
            texts.append(IMAGE_PLACEHOLDER)
            held = [fields] if "bytes" in fields else []
            named += [*held, *(fields[key] for key in _PART_NAMES if fields.get(key))][:1]
        elif kind == "text" and isinstance(fields.get("text"), str):
            if listed_pictures(fields):
                raise UserError(
                    f"a part of type 'text' in its conversation names a picture in {_named_in(fields)}; "
                    "make it a part of type 'image'"
                )
            text, tagged = take_image_tags(fields["text"], IMAGE_PLACEHOLDER)
            texts.append(text)
            named += tagged
        else:
            raise UserError(f"a part of type {kind!r} in its conversation is neither text nor image")
    return "".join(texts), named, has_pictures


def _refuse_index(fields: Mapping[str, Any], before: int) -> None:
    """Pictures stand in their order; a part that asks for another one by its number would get the wrong one."""
    index = fields.get("index", before)
    if index != before:
        raise UserError(
            f"a part of its conversation is picture {before} and has 'index' {index!r}; list pictures in the order in which "
            "they stand, and leave the index out"
        )


def _named_in(fields: Mapping[str, Any]) -> str:
    return repr(next((name for name in IMAGE_FIELDS if fields.get(name)), "file_name"))
