"""Megatron-Energon's WebDatasets: which member is what (dataset.yaml), and which tar is for training (split.yaml).

A field map has, for each field of Energon's sample, members by the names after the key: `jpg`, a place in a JSON
(`json[a][0]`), or several, of which the first that is there counts (`jpg,png`). Read are fields of captions, questions and
text. Without a field map (a crude dataset) samples are read as those of any tar. Sample loaders, Python files, are not run.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_nvlm.data.building.pictures import is_picture
from megatron_nvlm.data.building.tars import expand_braces
from megatron_nvlm.data.building.text import decode_text, load_json
from megatron_nvlm.errors import UserError
from megatron_nvlm.regular_files import read_whole

META_FOLDER = ".nv-meta"
TRAIN = "train"
_FIELDS = {"image": "image", "caption": "caption", "context": "question", "answers": "answers", "text": "text"}
"""Energon's names of fields, and those of forms.py."""
_WEIGHTS = "answer_weights"
_KNOWN_KEYS = ("field_map", "sample_loader", "part_filter", "sample_type", "__module__", "__class__")
_WITHOUT_EFFECT = (
    *("subflavor", "subflavors", "decoder", "auto_decode", "image_decode", "ignore_decoder_errors"),
    *("video_decode_audio", "av_decode", "guess_content", "max_samples_per_sequence", "shuffle_over_epochs_multiplier"),
)
"""Keys that say how Energon decodes and shuffles."""
_PLACE = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")


@dataclass(frozen=True)
class Place:
    """A member, and the way to a value in its JSON."""

    member: str
    keys: tuple[str, ...]

    def find(self, members: Mapping[str, bytes]) -> Any:
        """The value; KeyError if there is none.

        Raises:
            UserError: the member is neither a picture, a text nor a JSON.
        """
        data = members[self.member]
        if not self.keys and is_picture(self.member, data):
            return data
        kind = self.member.rpartition(".")[2]
        if kind not in ("json", "txt", "text", "transcript", "cls", "cls2", "index"):
            raise UserError(f"its member {self.member} is neither a picture, a .txt nor a .json")
        value = load_json(data) if kind == "json" else decode_text(data, f"its member {self.member}")
        for key in self.keys:
            value = _step(value, key)
        return value


def _step(value: Any, key: str) -> Any:
    """A value within another; KeyError if it is not there."""
    if isinstance(value, Mapping):
        return value[key]
    if isinstance(value, list) and key.isdigit() and int(key) < len(value):
        return value[int(key)]
    raise KeyError(key)


@dataclass(frozen=True)
class FieldMap:
    """What a dataset.yaml says: of each field the places where it may stand, in order."""

    fields: Mapping[str, tuple[Place, ...]]

    def describe(self) -> str:
        """What decides the samples, for a fingerprint."""
        return repr(sorted(self.fields.items()))

    def apply(self, members: Mapping[str, bytes]) -> tuple[dict[str, Any], list[bytes], set[str]]:
        """A sample's fields by our names, its pictures, and the members that were read.

        Raises:
            UserError: a field has no value, or one that it cannot have.
        """
        content: dict[str, Any] = {}
        pictures: list[bytes] = []
        used = set()
        values = {}
        for field, places in self.fields.items():
            values[field], member = _first_found(field, places, members)
            used.add(member)
        for field, value in values.items():
            if field == "image":
                if not isinstance(value, bytes):
                    raise UserError(f"its field_map names {_spell(self.fields[field])} as image, which is no picture")
                pictures.append(value)
            elif isinstance(value, bytes):
                raise UserError(f"its field_map names a picture, {_spell(self.fields[field])}, as {field}")
            elif field == "answers" and _WEIGHTS in values:
                content[_FIELDS[field]] = _heaviest(value, values[_WEIGHTS])
            elif field != _WEIGHTS:
                content[_FIELDS[field]] = value
        return content, pictures, used


def _first_found(field: str, places: tuple[Place, ...], members: Mapping[str, bytes]) -> tuple[Any, str]:
    for place in places:
        try:
            return place.find(members), place.member
        except KeyError:
            continue
    raise UserError(f"it has no {_spell(places)}, which its field_map names as {field}; it has {', '.join(members)}")


def _heaviest(answers: Any, weights: Any) -> Any:
    """The answer of the largest weight, the first of equals; Energon keeps all."""
    if not isinstance(answers, list) or not isinstance(weights, list) or len(answers) != len(weights) or not answers:
        raise UserError("its answers and answer_weights are no lists of one length")
    if not all(isinstance(weight, int | float) for weight in weights):
        raise UserError("its answer_weights are no numbers")
    return answers[max(range(len(weights)), key=weights.__getitem__)]


def _spell(places: tuple[Place, ...]) -> str:
    return " or ".join(place.member + "".join(f"[{key}]" for key in place.keys) for place in places)


def read_field_map(folder: Path) -> FieldMap | None:
    """The field map of a folder that Energon prepared; None for another folder, or a crude dataset.

    Raises:
        UserError: its dataset.yaml cannot be followed.
    """
    path = folder / META_FOLDER / "dataset.yaml"
    if not path.exists():
        return None
    content = _read_yaml(path)
    if content.get("sample_loader") is not None:
        raise UserError(
            f"{path} names a sample_loader, Python that no build runs; give it a field_map, or name the tars by a pattern "
            "('DIR/**/*.tar') to read their members as they are"
        )
    unknown = sorted(content.keys() - {*_KNOWN_KEYS, *_WITHOUT_EFFECT}, key=str)
    if unknown:
        raise UserError(f"{path} has {unknown[0]!r}, which no build follows; leave it out")
    described = content.get("field_map")
    if described is None:
        return None
    if not isinstance(described, dict) or not described:
        raise UserError(f"{path}: its field_map is no object of fields and members")
    foreign = [field for field in described if field not in (*_FIELDS, _WEIGHTS)]
    if foreign:
        raise UserError(
            f"{path}: its field_map has {foreign[0]!r}; a build reads {', '.join((*_FIELDS, _WEIGHTS))}; leave it out"
        )
    return FieldMap({field: _places(path, field, text) for field, text in described.items()})


def _places(path: Path, field: str, text: Any) -> tuple[Place, ...]:
    found = []
    for option in text.split(",") if isinstance(text, str) else [""]:
        match = _PLACE.fullmatch(option.strip())
        if match is None:
            raise UserError(
                f"{path}: its field_map has {field}: {text!r}, which is no member such as jpg or json[caption]"
            )
        found.append(Place(match[1].lower(), tuple(re.findall(r"\[([^\[\]]+)\]", match[2]))))
    return tuple(found)


def tars_for_training(folder: Path, tars: list[Path]) -> tuple[list[Path], dict[str, int]]:
    """The tars of part `train` of a folder that Energon prepared, and how many others there are, by what they are for.

    Raises:
        UserError: its split.yaml cannot be followed.
    """
    path = folder / META_FOLDER / "split.yaml"
    if not path.exists():
        return tars, {}
    content = _read_yaml(path)
    parts = content.get("split_parts")
    if not isinstance(parts, dict) or not all(isinstance(names, list) for names in parts.values()):
        raise UserError(f"{path} has no 'split_parts' with a list of tars for each part")
    excluded = {str(name) for name in content.get("exclude") or []}
    samples = sorted(name for name in excluded if not name.endswith(".tar"))
    if samples:
        raise UserError(f"{path} excludes the sample {samples[0]}, which no build follows; leave it out of the tar")
    part_of = {name: str(part) for part, names in parts.items() for name in _expand_all(names)}
    if TRAIN not in part_of.values():
        raise UserError(f"{path} has no tar of part {TRAIN}; name the tars by a pattern ('DIR/**/*.tar')")
    chosen, left = [], dict[str, int]()
    for tar in tars:
        name = tar.relative_to(folder).as_posix()
        part = "excluded" if name in excluded else part_of.get(name, "no part")
        if part == TRAIN:
            chosen.append(tar)
        else:
            left[f"tar of split part {part}"] = left.get(f"tar of split part {part}", 0) + 1
    missing = sorted(set(part_of) - excluded - {tar.relative_to(folder).as_posix() for tar in tars})
    missing = [name for name in missing if part_of[name] == TRAIN]
    if missing:
        raise UserError(f"there is no {folder / missing[0]}, which {path} names; correct it")
    return chosen, left


def _expand_all(names: list[Any]) -> list[str]:
    return [str(expanded) for name in names for expanded in expand_braces(str(name))]


def _read_yaml(path: Path) -> dict[str, Any]:
    data = read_whole(path, str(path))
    try:
        content = yaml.safe_load(decode_text(data, str(path)))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object")
    return content
