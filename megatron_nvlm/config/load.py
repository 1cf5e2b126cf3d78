"""A YAML file and `key=value` overrides to a RunConfig; an unknown key is an error that names the nearest right one."""

import dataclasses
import difflib
import logging
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.errors import UserError
from megatron_nvlm.regular_files import check_regular

logger = logging.getLogger(__name__)

Section = TypeVar("Section")

RENAMED_SECTIONS = {"stage": "recipe"}
"""Names of sections in run files of earlier versions, and today's."""
RUN_FILE_FOLDERS = (Path(__file__).parents[2] / "configs", Path(__file__).parents[1] / "configs")
"""Where run files are found by name: configs/ of a checkout, and the copy that an installed package carries."""


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run.

    Args:
        path: a file, or the name of a run file of the package.
        overrides: `section.key=value`, in YAML's spelling of values.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, missing, or has a value of the wrong type.
    """
    path = find_run_file(path)
    return read_typed(path, RunConfig, "run file", lambda config: _override(config, overrides, str(path)))


def _override(config: Any, overrides: Sequence[str], where: str) -> None:
    for override in _rename_old_sections(config, overrides, where):
        _apply(config, override)


def read_typed(
    path: Path, section: type[Section], what: str, change: Callable[[Any], None] = lambda config: None
) -> Section:
    """A YAML file as a dataclass.

    Args:
        section: the dataclass.
        what: the kind of file, for the sentence.
        change: applied to what was read before it is checked.

    Raises:
        UserError: the file is no YAML, a key is unknown, missing, or has a value of the wrong type.
    """
    try:
        config = OmegaConf.load(path)
        change(config)
        plain = OmegaConf.to_container(config, resolve=True)
    except UserError:
        raise
    except Exception as error:  # the YAML reader and OmegaConf each have their own
        raise UserError(f"{path} cannot be read as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(plain, dict):
        raise UserError(f"{path} is no {what}: it holds no keys")
    _check_keys(plain, section, "", str(path))
    try:
        typed = OmegaConf.merge(OmegaConf.structured(section), plain)
        found = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "a key"
        raise UserError(f"{path}: {where} has a value of the wrong type ({str(error).splitlines()[0]})") from error
    assert isinstance(found, section)
    return found


def _rename_old_sections(config: Any, overrides: Sequence[str], where: str) -> list[str]:
    """Give sections of earlier versions today's names, in the file and in the overrides; one warning names them.

    Returns:
        The overrides by today's names.
    """
    found = set()
    for old, new in RENAMED_SECTIONS.items():
        if OmegaConf.is_dict(config) and old in config:
            if new in config:
                raise UserError(f"{where} has both {old} and {new}; {new} is the new name of {old}, so remove {old}")
            config[new] = config.pop(old)
            found.add(old)
    renamed = []
    for override in overrides:
        section = re.split(r"[.=]", override, maxsplit=1)[0]
        if section in RENAMED_SECTIONS:
            found.add(section)
            override = RENAMED_SECTIONS[section] + override.removeprefix(section)
        renamed.append(override)
    if found and os.environ.get("RANK", "0") == "0":
        names = ", ".join(f"{old} is now {RENAMED_SECTIONS[old]}" for old in sorted(found))
        logger.warning(
            "%s: section names have changed (%s); the next version no longer reads the old names", where, names
        )
    return renamed


def find_run_file(name: str | Path) -> Path:
    """A path of the user's, or one of the package's run files by name (`demo_h`, `demo_h.yaml`).

    Raises:
        UserError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if not Path(name).is_dir():  # a folder may bear the name of a run file: runs are in folders
        check_regular(name)
    if Path(name).name == str(name):
        for folder in RUN_FILE_FOLDERS:
            found = folder / f"{str(name).removesuffix('.yaml')}.yaml"
            if found.is_file():
                return found
    known = sorted({file.stem for folder in RUN_FILE_FOLDERS for file in folder.glob("*.yaml")})
    near = difflib.get_close_matches(Path(name).stem, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"by name there are {', '.join(known)}"
    raise UserError(f"there is no run file {name}; {hint}")


def dump_run(run: RunConfig) -> str:
    """The run as YAML, every key written out."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(run)))


def _apply(config: Any, override: str) -> None:
    """Set one `section.key=value`; a number in the key is a place in a list (data.train.0.weight)."""
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"the argument {override!r} is no override; write section.key=value")
    try:
        OmegaConf.update(config, key, OmegaConf.from_dotlist([f"value={value}"])["value"], force_add=True)
    except (OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the override {override!r} cannot be applied ({reason})") from error


def _check_keys(values: Mapping[Any, Any], section: type, prefix: str, where: str) -> None:
    """Compare keys with the fields of `section`, in depth."""
    hints = typing.get_type_hints(section)
    fields = {field.name: field for field in dataclasses.fields(section)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.4)
            advice = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(fields)}"
            raise UserError(f"{where}: unknown key {prefix}{key}; {advice}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name not in values:
            if required:
                raise UserError(f"{where}: the key {prefix}{name} is missing")
            continue
        inner = _dataclass_of(hints[name])
        value = values[name]
        if inner is not None and isinstance(value, Mapping):
            _check_keys(value, inner, f"{prefix}{name}.", where)
        elif inner is not None and isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, Mapping):
                    _check_keys(item, inner, f"{prefix}{name}.{number}.", where)


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass that a field holds, alone, in a list, or optional."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    if typing.get_origin(hint) in (list, typing.Union, types.UnionType):
        for argument in typing.get_args(hint):
            found = _dataclass_of(argument)
            if found is not None:
                return found
    return None
