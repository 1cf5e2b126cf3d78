"""InternVL's meta files: one JSON object that names sets, each with its annotations and the folder of its images."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nvlm.data.building.text import parse_json
from megatron_nvlm.errors import UserError
from megatron_nvlm.regular_files import read_whole

_WITHOUT_EFFECT = ("data_augment", "length", "max_dynamic_patch")
"""Keys that say how InternVL trains on a set; a build of shards counts samples itself."""


@dataclass(frozen=True)
class MetaSet:
    """One set of a meta file."""

    name: str
    annotation: Path
    root: Path
    weight: float
    """`repeat_time`: how often InternVL goes over the set in an epoch."""
    without_effect: tuple[str, ...]
    """Its keys that a build does not follow."""


def read_meta(path: Path) -> list[MetaSet]:
    """The sets of a meta file, in its order; relative paths begin at the current directory, as InternVL's do.

    Raises:
        UserError: it is no meta file.
    """
    try:
        data = read_whole(path, f"the meta file {path}")
    except UserError as error:
        raise UserError(f"{error}; correct --internvl-meta") from error
    try:
        content = parse_json(data)
    except UserError as error:
        raise UserError(f"the meta file {path} is none: {error}; correct --internvl-meta") from error
    if not content:
        raise UserError(f"the meta file {path} names no set; correct --internvl-meta")
    return [_read_set(path, name, fields) for name, fields in content.items()]


def _read_set(path: Path, name: str, fields: Any) -> MetaSet:
    place = f"the set {name!r} of {path}"
    if not isinstance(fields, dict):
        raise UserError(f"{place} is no object with 'annotation' and 'root'; correct it")
    annotation, root, weight = fields.get("annotation"), fields.get("root", ""), fields.get("repeat_time", 1)
    if not isinstance(annotation, str) or not annotation:
        raise UserError(f"{place} has no 'annotation', the path of its JSON lines; add it")
    if not isinstance(root, str):
        raise UserError(f"{place} has a 'root' that is no path; correct it")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise UserError(f"{place} has 'repeat_time' {weight!r}; it must be a number above 0")
    unknown = sorted(fields.keys() - {"annotation", "root", "repeat_time", *_WITHOUT_EFFECT})
    if unknown:
        raise UserError(f"{place} has {unknown[0]!r}, which no build follows; leave it out")
    ignored = tuple(key for key in _WITHOUT_EFFECT if key in fields)
    return MetaSet(name, Path(annotation), Path(root) if root else Path(annotation).parent, float(weight), ignored)


def describe_meta(sets: list[MetaSet]) -> str:
    """What a build takes from a meta file and what is left to the run, as lines for the terminal."""
    lines = []
    for one in sets:
        left = f"; without effect: {', '.join(one.without_effect)}" if one.without_effect else ""
        lines.append(
            f"{one.name}: {one.annotation}, images in {one.root}; repeat_time {one.weight:g} is not applied{left}"
        )
    if len({one.weight for one in sets}) > 1:
        lines.append("to keep repeat_time, build each set alone and give it as the weight in data.train of the run")
    return "\n".join(lines)
