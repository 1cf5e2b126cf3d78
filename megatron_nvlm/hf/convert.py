"""Conversions between Hugging Face folders and our checkpoints, streamed: one weight in memory at a time.

Each begins with a census of both sides, and writes into a folder whose name begins with a dot until it is whole.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_nvlm.checkpoint.save_load import Identity, Progress, write_identity
from megatron_nvlm.checkpoint.stream_files import write_checkpoint
from megatron_nvlm.checkpoint.tensor_source import (
    FirstRows,
    Joined,
    Made,
    TensorInfo,
    TensorSource,
    as_bytes,
    in_pieces,
)
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.adapters import AdapterFolder
from megatron_nvlm.hf.open_folders import check_shapes, open_folders, refuse_missing_components
from megatron_nvlm.hf.safetensors_files import file_names, plan_files, write_file, write_index
from megatron_nvlm.hf.weight_tables import nvlm_rows
from megatron_nvlm.models.config import ResolvedModel
from megatron_nvlm.models.initialise import Spread, keeps_first_value, new_weight
from megatron_nvlm.models.sharding import VOCABULARY_SPLITS
from megatron_nvlm.models.weight_rows import Row, check_our_names

MARK_FILE = "conversion.json"
Done = Callable[[int], object]


@dataclass(frozen=True)
class OurModel:
    """What the real model, built without memory, says of itself: the other side of the census."""

    infos: dict[str, TensorInfo]


def describe_model(shapes: dict[str, tuple[int, ...]]) -> OurModel:
    """Describe a model by the whole shapes of its parameters."""
    return OurModel({name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()})


def imported_source(
    model: ResolvedModel,
    ours: OurModel,
    seed: int,
    dtype: torch.dtype | None,
    adapters: AdapterFolder | None = None,
) -> TensorSource:
    """All weights of a model: those of the folders that it names, and new ones for parts that they lack.

    Args:
        dtype: of all weights; None keeps each folder's, and gives new weights that of the first.
        adapters: of the language model; None for new ones, where the model has any.

    Raises:
        CensusError: names or shapes do not match, with the full list.
    """
    weights = open_folders(model)
    if weights is None:
        raise UserError("no folder is named; give --hf, or --language-model and --vision-model")
    sources = [weights.ours]
    check_shapes(weights.ours.infos, ours.infos, "the folder")
    if adapters is not None:
        sources.append(adapters.as_ours(model.language))
        check_shapes(sources[-1].infos, ours.infos, str(adapters.folder))
    found = Joined(sources)
    new = refuse_missing_components(list(found.infos), list(ours.infos), "the import")
    kept = next(iter(weights.ours.infos.values())).dtype
    spread = Spread(model.config.init_std, model.language.num_layers)

    def make(name: str) -> Tensor:
        shape = list(ours.infos[name].shape)
        if not keeps_first_value(name):
            return new_weight(name, shape, spread, seed).to(dtype or kept)
        if name.endswith(".gate"):
            return torch.full(shape, model.config.cross_attention.gate_init, dtype=dtype or kept)
        return (torch.zeros if name.endswith(".bias") else torch.ones)(shape, dtype=dtype or kept)

    made = Made({name: TensorInfo(ours.infos[name].shape, dtype or kept) for name in new}, make)
    return Joined([cast(found, dtype or (kept if adapters else None)), made])


class _Cast:
    """A source in another type."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        self.infos = {name: TensorInfo(info.shape, dtype) for name, info in source.infos.items()}

    def read(self, name: str) -> Tensor:
        return self._source.read(name).to(self._dtype)


def cast(source: TensorSource, dtype: torch.dtype | None) -> TensorSource:
    """A source in another type; None for the same."""
    return _Cast(source, dtype) if dtype else source


def write_import(
    folder: Path, source: TensorSource, ours: OurModel, identity: Identity, mark: dict[str, Any], done: Done
) -> None:
    """A checkpoint in `folder`, which must not exist; goes on where a call with the same `mark` was interrupted."""
    partial = begin(folder, mark)
    progress = Progress(0, DataPosition())
    write_checkpoint(partial, source, {"progress": progress.to_plain()}, done)
    write_identity(partial, identity, progress)
    finish(partial, folder)


class AsTheirs:
    """Our weights under a folder's names; several that come from one are made together.

    Raises:
        CensusError: when made, unless rows and source match name for name.
    """

    def __init__(self, rows: Sequence[Row], ours: TensorSource, where: str) -> None:
        check_our_names(rows, ours.infos, where)
        self._ours = ours
        self._row_of: dict[str, Row] = {}
        self._held: dict[str, Tensor] = {}
        self.infos: dict[str, TensorInfo] = {}
        for row in rows:
            for name, tensor in zip(row.theirs, row.transform.to_theirs(ours.infos[row.ours].meta()), strict=True):
                self._row_of[name] = row
                self.infos[name] = TensorInfo.of(tensor)

    def read(self, name: str) -> Tensor:
        """One tensor; those of the same row are kept until another row is read."""
        if name not in self._held:
            row = self._row_of[name]
            self._held = dict(zip(row.theirs, row.transform.to_theirs(self._ours.read(row.ours)), strict=True))
        return self._held[name]


def export_source(
    model: ResolvedModel, ours: TensorSource, described: OurModel, dtype: torch.dtype | None, where: str
) -> TensorSource:
    """A checkpoint's weights under the names of a Hugging Face folder; CensusError unless it is of that model."""
    rows = nvlm_rows(model.variant, model.language, model.vision, model.config.cross_attention)
    vocabulary = model.language.vocab_size
    filled_up = {name: vocabulary for name, info in ours.infos.items() if is_filled_up(name, info, vocabulary)}
    ours = FirstRows(ours, filled_up)
    theirs = AsTheirs(rows, ours, where)
    check_shapes(ours.infos, described.infos, where)
    return cast(theirs, dtype)


def is_filled_up(name: str, info: TensorInfo, vocabulary: int) -> bool:
    """Whether a checkpoint's embedding or output layer has zeros after the vocabulary, for ranks that do not divide it."""
    by_id = any(re.fullmatch(pattern, name) for pattern, _ in VOCABULARY_SPLITS)
    return by_id and vocabulary < info.shape[0] < 2 * vocabulary


def write_export(
    folder: Path,
    source: TensorSource,
    write_others: Callable[[Path], object],
    mark: dict[str, Any],
    done: Done,
    most_bytes: int,
) -> None:
    """A Hugging Face folder, which must not exist; goes on where a call with the same `mark` was interrupted.

    Args:
        write_others: writes config.json and what else stands beside the weights.
    """
    partial = begin(folder, mark)
    files = plan_files(source.infos, most_bytes)
    for name, infos in zip(file_names(len(files)), files, strict=True):
        if (partial / name).is_file():
            done(sum(info.num_bytes for info in infos.values()))
        else:
            write_file(partial / name, infos, source.read, done)
    if len(files) > 1:
        write_index(partial, files)
    write_others(partial)
    finish(partial, folder)


def begin(folder: Path, mark: dict[str, Any]) -> Path:
    """The hidden folder to write into; what another conversion left there is removed."""
    if folder.exists():
        raise UserError(f"{folder} is there already; name another folder, or remove it")
    partial = folder.with_name(f".{folder.name}.partial")
    marked = partial / MARK_FILE
    content = json.dumps(mark)
    if partial.exists() and (not marked.is_file() or marked.read_text() != content):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    marked.write_text(content)
    return partial


def finish(partial: Path, folder: Path) -> None:
    """The folder under its own name, whole."""
    (partial / MARK_FILE).unlink()
    partial.rename(folder)


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same on both sides."""

    name: str
    what: str


def compare(first: TensorSource, second: TensorSource, done: Done) -> Iterator[Difference]:
    """Tensors that are not bit for bit the same, name by name."""
    for name in sorted(first.infos.keys() | second.infos.keys()):
        if name not in second.infos or name not in first.infos:
            yield Difference(name, f"only in the {'first' if name in first.infos else 'second'}")
            continue
        one, other = first.infos[name], second.infos[name]
        done(one.num_bytes)
        if one.shape != other.shape:
            yield Difference(name, f"{list(one.shape)} and {list(other.shape)}")
            continue
        found = _compare_numbers(first.read(name), second.read(name))
        if found or one.dtype != other.dtype:
            types = f"{one.dtype} and {other.dtype}; ".replace("torch.", "") if one.dtype != other.dtype else ""
            yield Difference(name, types + (found or "values equal"))


_NUMBERS_AT_ONCE = 16 << 20


def _compare_numbers(one: Tensor, other: Tensor) -> str:
    """What differs, or nothing."""
    differing, largest = 0, 0.0
    for left, right in zip(in_pieces(one, _NUMBERS_AT_ONCE), in_pieces(other, _NUMBERS_AT_ONCE), strict=True):
        alike = left.dtype == right.dtype
        same = torch.equal(as_bytes(left), as_bytes(right)) if alike else bool((left == right).all())
        if not same:
            gap = (left.double() - right.double()).abs()
            differing += int((gap > 0).sum())
            largest = max(largest, float(gap.max()))
    return f"{differing} of {one.numel()} numbers differ, by {largest:.3g} at most" if differing else ""
