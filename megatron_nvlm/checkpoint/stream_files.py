"""Our checkpoints without a model: weights written and read a piece at a time, in the format of `dist_checkpointing`.

Core can only save what is in memory. A 72B model need not be: its files are written one after the other here, each
complete or absent, so an interrupted conversion goes on where it was.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_nvlm.checkpoint.tensor_source import TensorInfo, TensorSource
from megatron_nvlm.errors import UserError

METADATA_FILE = ".metadata"
_PIECE_BYTES = 256 << 20
_CORE_METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

Piece = tuple[str, int, int]
"""A tensor's name and its range of rows [first, last)."""


def plan_pieces(infos: dict[str, TensorInfo], most_bytes: int = _PIECE_BYTES) -> list[list[Piece]]:
    """Files and the pieces of tensors in each, in order: about `most_bytes` a file."""
    files: list[list[Piece]] = []
    room = 0
    for name, info in infos.items():
        rows, row_bytes, first = info.rows, max(1, info.row_bytes), 0
        while first < rows:
            if room < row_bytes or not files:
                files.append([])
                room = max(most_bytes, row_bytes)
            last = min(rows, first + room // row_bytes)
            files[-1].append((name, first, last))
            room -= (last - first) * row_bytes
            first = last
    return files


def write_checkpoint(
    folder: Path,
    source: TensorSource,
    common: dict[str, Any],
    done: Callable[[int], object] | None = None,
) -> None:
    """Weights as a checkpoint that core loads under any layout.

    Args:
        folder: may hold files of an interrupted call with the same source, which stay.
        common: what every rank reads as it is (progress).
        done: is told the bytes of each piece once it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    storage: dict[MetadataIndex, _StorageInfo] = {}
    first_rows: dict[str, list[int]] = {}
    held: dict[str, Tensor] = {}
    for number, pieces in enumerate(plan_pieces(source.infos)):
        path = folder / f"__0_{number}.distcp"
        places = _places_of_complete(path)
        if places is None:
            places = _write_pieces(path, pieces, lambda name: _read_once(held, source, name), done)
        elif done is not None:
            done(sum(source.infos[name].row_bytes * (last - first) for name, first, last in pieces))
        for (name, first, _), (offset, length) in zip(pieces, places, strict=True):
            first_rows.setdefault(name, []).append(first)
            storage[MetadataIndex(name, _offsets(source.infos[name], first))] = _StorageInfo(path.name, offset, length)
    entries: dict[str, Any] = {name: _described(info, first_rows[name]) for name, info in source.infos.items()}
    torch.save(common, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_CORE_METADATA))
    with (folder / METADATA_FILE).open("wb") as file:
        pickle.dump(Metadata(state_dict_metadata=entries, storage_data=storage), file)
    for sidecar in folder.glob("__0_*.places"):
        sidecar.unlink()


def _read_once(held: dict[str, Tensor], source: TensorSource, name: str) -> Tensor:
    """A tensor that spans several pieces is made once."""
    if name not in held:
        held.clear()
        held[name] = source.read(name)
    return held[name]


def _write_pieces(
    path: Path, pieces: list[Piece], read: Callable[[str], Tensor], done: Callable[[int], object] | None
) -> list[tuple[int, int]]:
    """A file of pieces; returns the place of each. Where it was written to is remembered beside it until the end."""
    partial = path.with_suffix(".partial")
    places = []
    with partial.open("wb") as file:
        for name, first, last in pieces:
            tensor = read(name)
            part = tensor[first:last] if tensor.dim() else tensor
            begin = file.tell()
            torch.save(part.clone(memory_format=torch.contiguous_format), file)
            places.append((begin, file.tell() - begin))
            if done is not None:
                done(part.numel() * part.element_size())
    path.with_suffix(".places").write_text(json.dumps(places))
    os.replace(partial, path)
    return places


def _places_of_complete(path: Path) -> list[tuple[int, int]] | None:
    """Places in a file that an earlier call completed; None if it did not."""
    sidecar = path.with_suffix(".places")
    if not path.is_file() or not sidecar.is_file():
        return None
    places = [(begin, length) for begin, length in json.loads(sidecar.read_text())]
    return places if sum(places[-1]) == path.stat().st_size else None


def _offsets(info: TensorInfo, first: int) -> tuple[int, ...]:
    return (first, *([0] * (len(info.shape) - 1))) if info.shape else ()


def _described(info: TensorInfo, firsts: list[int]) -> TensorStorageMetadata:
    chunks = [
        ChunkStorageMetadata(
            torch.Size(_offsets(info, first)), torch.Size((last - first, *info.shape[1:]) if info.shape else ())
        )
        for first, last in zip(firsts, [*firsts[1:], info.rows], strict=True)
    ]
    return TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(info.shape), chunks)


class CheckpointWeights:
    """The weights of a checkpoint, without its optimizer, each read when it is asked for, wherever its pieces lie.

    Raises:
        UserError: when made or read, if the folder is no checkpoint or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(str(folder))
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:  # pickle raises many types
            raise UserError(f"{folder} is no checkpoint: its {METADATA_FILE} cannot be read ({error})") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.infos = {name: info for name, info in self._all_infos() if not name.startswith("optimizer.")}

    def _all_infos(self) -> Iterator[tuple[str, TensorInfo]]:
        for name, entry in self._metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                yield name, TensorInfo(tuple(entry.size), entry.properties.dtype)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        info = self.infos[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        planner = DefaultLoadPlanner()
        only = Metadata({name: self._metadata.state_dict_metadata[name]}, storage_data=self._metadata.storage_data)
        planner.set_up_planner({name: tensor}, only, is_coordinator=True)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # files missing, cut short or of other content
            raise UserError(
                f"{self.folder} is damaged: {name} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})"
            ) from error
        return tensor
