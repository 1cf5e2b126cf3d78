"""Tars of many samples, found by folder, pattern or braces."""

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_nvlm.data.building.inputs import files_below
from megatron_nvlm.errors import UserError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TAR_SUFFIX = re.compile(r"\.(tar(\.gz|\.zst)?|tgz|tzst)$")
_MOST_NAMES = 1_000_000
"""Names that braces may stand for."""


def find_tars(path: Path, faults: list[str]) -> list[Path]:
    """Tars of a folder and all folders below it, of a pattern (`a/*.tar`, `**`), of braces (`{000..127}`), or one tar.

    Args:
        faults: gets a sentence for each folder that cannot be read.

    Raises:
        UserError: there is none, one that braces name is missing, or one lies beside its compressed copy.
    """
    name = str(path)
    if _RANGE.search(name) and not path.exists():
        found = list(expand_braces(name))
        missing = next((file for file in found if not file.exists()), None)
        if missing is not None:
            raise UserError(f"there is no shard {missing}, which {path} names; correct --webdataset")
    elif path.is_dir():
        found = sorted(path / file for file in files_below(path, faults) if file.name.endswith(TAR_SUFFIXES))
    elif path.exists():
        found = [path]
    else:
        found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))) if _is_pattern(name) else ())
    if not found:
        what = f"{path}/*.tar" if path.is_dir() else path
        raise UserError(f"there is no shard {what}; correct --webdataset")
    _refuse_twins(found)
    return found


def _refuse_twins(found: list[Path]) -> None:
    """Refuse a tar beside its compressed copy: every sample would be taken twice."""
    first_of: dict[str, Path] = {}
    for path in found:
        first = first_of.setdefault(_TAR_SUFFIX.sub("", str(path)), path)
        if first is not path:
            raise UserError(f"{first} and {path} are two forms of one tar; keep one, or name tars by a pattern")


def _is_pattern(name: str) -> bool:
    return any(letter in name for letter in "*?[")


def expand_braces(name: str) -> Iterator[Path]:
    """Each name that ranges in braces stand for, in order, with as many digits as the first bound has."""
    braces = _RANGE.search(name)
    if braces is None:
        yield Path(name)
        return
    first, last = (int(bound) for bound in braces.groups())
    if not 0 <= last - first < _MOST_NAMES:
        raise UserError(f"{braces[0]} in {name} stands for no name, or for over {_MOST_NAMES}; correct --webdataset")
    for number in range(first, last + 1):
        yield from expand_braces(f"{name[: braces.start()]}{number:0{len(braces[1])}d}{name[braces.end() :]}")
