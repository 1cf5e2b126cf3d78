"""Other names for the fields, roles and the placeholder that forms.py knows: as settings of a build."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_nvlm.data.building.forms import FORMS, TEXT_FIELDS
from megatron_nvlm.data.building.pictures import FILE_NAME_FIELDS, IMAGE_FIELDS
from megatron_nvlm.errors import UserError
from megatron_nvlm.text.conversation import IMAGE_PLACEHOLDER

TURN_FIELDS = ("from", "value")
"""Of a turn; the others are fields of a line."""
FIELDS = (*sorted({*TEXT_FIELDS, *IMAGE_FIELDS, *FILE_NAME_FIELDS}), *TURN_FIELDS)
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Names:
    """What a writer calls things; empty for our own names."""

    fields: tuple[tuple[str, str], ...] = ()
    """(ours, theirs), of lines and of turns."""
    roles: tuple[tuple[str, str], ...] = ()
    placeholder: str = IMAGE_PLACEHOLDER
    """What stands in a text where a picture stands. `<image>` still is one, too."""

    def describe(self) -> dict[str, Any]:
        """What differs from our names, as a build's settings; empty if nothing does."""
        said = {"fields": dict(self.fields), "roles": dict(self.roles)}
        told: dict[str, Any] = {name: value for name, value in said.items() if value}
        return told if self.placeholder == IMAGE_PLACEHOLDER else {**told, "placeholder": self.placeholder}

    def apply(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The sample with our names.

        Raises:
            UserError: it has a field under both names.
        """
        line = _rename(content, [pair for pair in self.fields if pair[0] not in TURN_FIELDS])
        for field in FORMS["conversation"].fields:
            if isinstance(line.get(field), list):
                line[field] = [self._turn(turn) if isinstance(turn, Mapping) else turn for turn in line[field]]
        if self.placeholder == IMAGE_PLACEHOLDER:
            return line
        return {name: self._place(value) if name in TEXT_FIELDS else value for name, value in line.items()}

    def _turn(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        renamed = _rename(turn, [pair for pair in self.fields if pair[0] in TURN_FIELDS])
        ours = {theirs: known for known, theirs in self.roles}
        for field in ("from", "role"):
            if isinstance(renamed.get(field), str):
                renamed[field] = ours.get(renamed[field], renamed[field])
        return renamed

    def _place(self, value: Any) -> Any:
        """The texts of a value with our placeholder; pictures' names are left as they are."""
        if isinstance(value, str):
            return value.replace(self.placeholder, IMAGE_PLACEHOLDER)
        if isinstance(value, list):
            return [self._place(one) for one in value]
        if isinstance(value, Mapping):
            kept = (*IMAGE_FIELDS, *FILE_NAME_FIELDS, "image_url", "path", "url", "bytes")
            return {key: one if key in kept else self._place(one) for key, one in value.items()}
        return value


OUR_NAMES = Names()


def read_names(fields: Sequence[str], roles: Sequence[str], placeholder: str) -> Names:
    """Names from options `OURS=THEIRS`.

    Raises:
        UserError: one is of another form, unknown or given twice.
    """
    if not placeholder.strip():
        raise UserError("--placeholder is empty; give the text that stands where a picture stands")
    return Names(_pairs(fields, "--field", FIELDS), _pairs(roles, "--role", ROLES), placeholder)


def _pairs(given: Sequence[str], option: str, known: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs: dict[str, str] = {}
    for one in given:
        ours, sign, theirs = one.partition("=")
        if not sign or not theirs:
            raise UserError(f"{option} {one!r} is not NAME=THEIRS, as in {option} {known[0]}=their_name; correct it")
        if ours not in known:
            raise UserError(f"{option} {one!r}: {ours!r} is no known name; choose one of {', '.join(known)}")
        if ours in pairs or theirs in pairs.values():
            raise UserError(f"{option} names {ours if ours in pairs else theirs!r} twice; leave one out")
        pairs[ours] = theirs
    return tuple(sorted(pairs.items()))


def _rename(content: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    ours = {theirs: known for known, theirs in pairs}
    renamed: dict[str, Any] = {}
    for field, value in content.items():
        name = ours.get(field, field)
        if renamed.get(name) is not None and value is not None:
            theirs = dict(pairs)[name]
            raise UserError(f"it has both {theirs!r}, which --field {name}={theirs} names, and {name!r}; leave one out")
        if renamed.get(name) is None:
            renamed[name] = value
    return renamed
