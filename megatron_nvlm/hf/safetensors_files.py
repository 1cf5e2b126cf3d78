"""Folders of safetensors files: read without loading them (memory-mapped), and written one tensor at a time.

The format is eight bytes with the header's length, the header in JSON (name -> dtype, shape, place), and the numbers.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_nvlm.checkpoint.tensor_source import TensorInfo, as_bytes, in_pieces
from megatron_nvlm.errors import UserError
from megatron_nvlm.regular_files import check_regular

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_COMPUTED = ".rotary_emb.inv_freq"
"""End of the names of buffers that older transformers stored and that every model computes for itself."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BYTES_AT_ONCE = 64 << 20


class SafetensorsFolder:
    """All tensors of a folder, from the files that transformers reads.

    `read` gives views of the mapped files: only pages that are used come into memory.

    Args:
        single_file: the name of a file that is read alone, where it is there.

    Raises:
        UserError: there are no safetensors files, one is broken or missing, or a tensor is in two of them.
    """

    def __init__(self, folder: Path, single_file: str = SINGLE_FILE) -> None:
        self.folder = folder
        self._single_file = single_file
        self.infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Any] = {}
        for path in self._paths():
            check_regular(path)
            try:
                opened = safe_open(path, framework="pt")
                for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                    if name.endswith(_COMPUTED):
                        continue
                    part = opened.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise UserError(
                            f"{path} holds {name} as {part.get_dtype()}, a type that is not read; take the weights in bf16, "
                            "fp16 or fp32"
                        )
                    if name in self._file_of:
                        raise UserError(f"{folder} holds {name} twice; remove the files that its index does not name")
                    self.infos[name] = TensorInfo(tuple(part.get_shape()), DTYPES[part.get_dtype()])
                    self._file_of[name] = opened
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is broken ({error}); fetch it again") from error
        self._check_index()

    def _paths(self) -> list[Path]:
        """The files that transformers reads: model.safetensors, else those that the index names, and no others."""
        if (self.folder / self._single_file).is_file():
            return [self.folder / self._single_file]
        if not (self.folder / INDEX_FILE).is_file():
            raise UserError(
                f"{self.folder} {self._what_else_is_there()}name a folder with {self._single_file} or {INDEX_FILE}"
            )
        paths = [self.folder / name for name in sorted(set(self._index().values()))]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise UserError(
                f"{self.folder / INDEX_FILE} names {len(missing)} files that are not there, {missing[0]} among them"
            )
        return paths

    def _what_else_is_there(self) -> str:
        others = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if others:
            return (
                f"holds {others[0]} and no {INDEX_FILE} that names it, so transformers reads none of it; fetch the index, "
                f"rename a single file to {self._single_file}, or "
            )
        found = "only .bin files, which are not read; " if list(self.folder.glob("*.bin")) else ""
        return f"holds no safetensors files; {found}"

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX_FILE
        check_regular(path)
        try:
            return dict(json.loads(path.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no index of safetensors files ({error}); fetch it again") from error

    def _check_index(self) -> None:
        if not (self.folder / self._single_file).is_file():
            missing = sorted(set(self._index()) - set(self.infos))
            if missing:
                raise UserError(
                    f"{self.folder / INDEX_FILE} names {len(missing)} tensors that its files lack, {missing[0]} among them"
                )

    def read(self, name: str) -> Tensor:
        """A view of the mapped file; copy what is to be changed."""
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor


def plan_files(infos: dict[str, TensorInfo], most_bytes: int) -> list[dict[str, TensorInfo]]:
    """Tensors in order, parted into files of at most `most_bytes` (a larger tensor is alone in its file)."""
    files: list[dict[str, TensorInfo]] = []
    size = 0
    for name, info in infos.items():
        if not files or (size + info.num_bytes > most_bytes and size):
            files.append({})
            size = 0
        files[-1][name] = info
        size += info.num_bytes
    return files


def write_index(folder: Path, files: list[dict[str, TensorInfo]]) -> None:
    """The index that names each tensor's file."""
    names = file_names(len(files))
    weight_map = {tensor: names[number] for number, file in enumerate(files) for tensor in file}
    total = sum(info.num_bytes for file in files for info in file.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def file_names(count: int) -> list[str]:
    """Hugging Face's names of a set of files."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_file(
    path: Path, infos: dict[str, TensorInfo], read: Callable[[str], Tensor], done: Callable[[int], object] | None = None
) -> None:
    """One file, a tensor at a time; complete or not there.

    Args:
        read: gives each tensor. done: is told the bytes of each tensor once written.
    """
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, info in infos.items():
        described[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [place, place + info.num_bytes],
        }
        place += info.num_bytes
    encoded = json.dumps(described, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # numbers begin at a multiple of eight
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for name, info in infos.items():
            tensor = read(name)
            if TensorInfo.of(tensor) != info:
                raise AssertionError(f"{name} is {TensorInfo.of(tensor)}, announced as {info}")
            # In pieces, so that a view over a mapped file is not copied as a whole.
            for part in in_pieces(tensor, _BYTES_AT_ONCE // tensor.element_size()):
                file.write(as_bytes(part).numpy().data)
            if done is not None:
                done(info.num_bytes)
    os.replace(partial, path)
