"""Tables as inputs, a row a sample: Parquet files, and the Arrow files of Hugging Face `datasets` (`save_to_disk`).

Columns are the fields of forms.py. Pictures stand in them as `datasets` writes them ({"bytes", "path"}), as bytes, or as
paths. A group of rows is read at a time, in the process that asks for it. Needs the package pyarrow.
"""

import datetime
import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_nvlm.data.building.forms import FORMS
from megatron_nvlm.data.building.inputs import FieldSamples
from megatron_nvlm.data.building.names import OUR_NAMES, Names
from megatron_nvlm.data.building.pictures import IMAGE_FIELDS
from megatron_nvlm.errors import UserError
from megatron_nvlm.regular_files import check_regular

SUFFIXES = (".parquet", ".arrow")
_TURNS = FORMS["conversation"].fields
_TAIL_BYTES = 1 << 16
"""Of each file that the fingerprint holds: there Parquet has its table of contents."""


@dataclass(frozen=True)
class _Group:
    """Rows that are read together: row group `index` of a Parquet file, or record batch `index` of an Arrow file."""

    file: Path
    index: int
    first_row: int
    """In its file."""


class TableRows(FieldSamples):
    """Rows of one file, or of all files of one kind below a folder; paths of images are relative to `images`.

    Raises:
        UserError: pyarrow is not installed, or there is no such file.
    """

    kind = "table"

    def __init__(self, path: Path, images: Path | None = None, names: Names = OUR_NAMES) -> None:
        if find_spec("pyarrow") is None:
            raise UserError("--table needs the package pyarrow; install it (pip install 'megatron-nvlm[tables]')")
        self.path, self.containers, self.names = path, find_tables(path), names
        self.images = images or (path if path.is_dir() else path.parent)
        self.faults, self.unread = list[str](), dict[str, int]()
        self.elsewhere = {} if images is None else {"images": str(self.images)}
        self._groups, self._starts, self._rows = list[_Group](), list[int](), 0
        digest = hashlib.sha256()
        for file in self.containers:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode(errors="surrogateescape"))
            with file.open("rb") as opened:
                opened.seek(max(0, size - _TAIL_BYTES))
                digest.update(opened.read())
            self._number(file)
        self.fingerprint = digest.hexdigest()
        self._held: tuple[_Group, Any] | None = None
        """The group that was read last."""

    def _number(self, file: Path) -> None:
        first = 0
        try:
            sizes = list(_group_sizes(file))
        except (OSError, ValueError) as error:  # Arrow's own errors are these
            self.faults.append(f"the table {file} cannot be read ({_first_line(error)}); fetch it again")
            return
        for index, size in enumerate(sizes):
            if size:
                self._groups.append(_Group(file, index, first))
                self._starts.append(self._rows)
            first, self._rows = first + size, self._rows + size

    def __len__(self) -> int:
        return self._rows

    def _find(self, number: int) -> tuple[_Group, int]:
        """(group, row in it) of a sample."""
        place = bisect_right(self._starts, number) - 1
        return self._groups[place], number - self._starts[place]

    def where(self, number: int) -> str:
        """Place of a sample, for messages."""
        group, row = self._find(number)
        return f"{group.file} row {group.first_row + row + 1}"

    def files_of(self, number: int) -> list[Path]:
        """Files that a sample is read from, there or not; its table too, whose content the fingerprint does not hold."""
        return [self._find(number)[0].file, *super().files_of(number)]

    def _fields(self, number: int) -> dict[str, Any]:
        group, row = self._find(number)
        try:
            if self._held is None or self._held[0] != group:
                self._held = group, _read_group(group)
            (found,) = self._held[1].slice(row, 1).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"its row cannot be read ({_first_line(error)})") from error
        return {field: _plain_field(field, value) for field, value in found.items()}


def find_tables(path: Path) -> list[Path]:
    """The files of a path, sorted; in a folder those below it, without hidden ones and the caches of `datasets`.

    Raises:
        UserError: there is none, or a folder has both kinds, which may hold the same rows twice.
    """
    if not path.is_dir():
        check_regular(path)
        if not path.is_file() or path.suffix not in SUFFIXES:
            raise UserError(f"{path} is no file that ends in {' or '.join(SUFFIXES)}, nor a folder; correct --table")
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES and file.is_file()]
    found = [file for file in found if not file.name.startswith((".", "cache-"))]
    kinds = {file.suffix for file in found}
    if len(kinds) != 1:
        fault = "no file that ends in" if not found else "files of both kinds,"
        raise UserError(f"{path} has {fault} {' and '.join(SUFFIXES)}; name the files or another folder with --table")
    return found


def _group_sizes(file: Path) -> Iterator[int]:
    """Rows of each group."""
    if file.suffix == ".arrow":
        yield from (batch.num_rows for batch in _batches(file))
        return
    from pyarrow import parquet

    facts = parquet.read_metadata(file)
    yield from (facts.row_group(index).num_rows for index in range(facts.num_row_groups))


def _read_group(group: _Group) -> Any:
    if group.file.suffix == ".arrow":
        return _batches(group.file)[group.index]
    from pyarrow import parquet

    with parquet.ParquetFile(group.file) as file:
        return file.read_row_group(group.index, use_threads=False)  # threads do not survive a fork


def _batches(file: Path) -> list[Any]:
    """Record batches of an Arrow stream (as `datasets` writes) or an Arrow file; their content stays on disk."""
    from pyarrow import ipc, memory_map

    source = memory_map(str(file))
    if source.read(6) == b"ARROW1":
        opened = ipc.open_file(source)
        return [opened.get_batch(index) for index in range(opened.num_record_batches)]
    source.seek(0)
    return list(ipc.open_stream(source))


def _plain_field(field: str, value: Any) -> Any:
    """A column's value as JSON has it, and pictures with their bytes."""
    if field in IMAGE_FIELDS and isinstance(value, bytes):
        return {"bytes": value}
    if field in IMAGE_FIELDS and isinstance(value, list):
        value = [{"bytes": one} if isinstance(one, bytes) else one for one in value]
    if field in _TURNS and isinstance(value, Mapping):
        value = _turns_of(field, value)
    return _plain(value, field, field in IMAGE_FIELDS or field in _TURNS)


def _turns_of(field: str, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A list of turns, which `datasets` may keep as one list for each of their fields."""
    lists = {name: values for name, values in columns.items() if values is not None}
    if not all(isinstance(values, list) for values in lists.values()) or len(set(map(len, lists.values()))) != 1:
        raise UserError(f"its {field!r} is neither a list of turns nor lists of their fields of one length")
    return [dict(zip(lists, turn, strict=True)) for turn in zip(*lists.values(), strict=True)]


def _plain(value: Any, place: str, may_hold_picture: bool) -> Any:
    if isinstance(value, list):
        return [_plain(one, place, may_hold_picture) for one in value]
    if isinstance(value, Mapping):
        return {key: _plain(one, f"{place}.{key}", may_hold_picture) for key, one in value.items()}
    if isinstance(value, bytes):
        if may_hold_picture and place.endswith(".bytes"):
            return value
        raise UserError(f"its {place!r} holds bytes and no text; write it as text, or leave the column out")
    if isinstance(value, float) and not math.isfinite(value):
        return None  # how tables write an empty cell
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | datetime.timedelta) else value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
