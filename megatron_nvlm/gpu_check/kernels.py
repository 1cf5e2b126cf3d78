"""Every Triton kernel with the blocks that the package chooses, compiled for GPUs that are not there.

`python -m megatron_nvlm.gpu_check.kernels 90` prints them as JSON. A process of its own (`compile_all`), since Triton
decides at its import whether kernels are compiled or interpreted.
"""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from megatron_nvlm.errors import UserError

CAPABILITIES = (80, 90, 100)
HEAD_SIZES = (64, 80, 96, 128)
"""Of the language models that the package knows, and of encoders."""
_TYPES = {
    "intervals": "*i32",
    "block_rows": "*i32",
    "lse": "*fp32",
    "delta": "*fp32",
    "scale": "fp32",
    "score_scale": "fp32",
    "labels": "*i64",
    "largest": "*fp32",
    "total": "*fp32",
    "target": "*fp32",
    "sums": "*fp32",
    "size": "i32",
    "first_column": "i32",
    "real_columns": "i32",
}
_NUMBERS = ("_row", "_head", "num_", "heads", "groups", "parts")
"""Beginnings and ends of integers; constants are upper case, strides of columns are 1, and all else is a matrix."""


def compile_all(capability: int) -> list[dict[str, Any]]:
    """Fields of `CompiledKernel` of each kernel, and whether it `fits`.

    Raises:
        UserError: Triton is not installed, or a kernel does not compile.
    """
    if find_spec("triton") is None:
        raise UserError("kernels are compiled by Triton, which is not installed; install triton")
    command = [sys.executable, "-m", "megatron_nvlm.gpu_check.kernels", str(capability)]
    variables = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"kernels do not compile for sm_{capability}:\n{done.stderr[-3000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _interval_kernels(capability: int) -> Iterator[tuple[Any, str, Mapping[str, Any]]]:
    """(kernel, name, constants) of interval attention at each head size."""
    from megatron_nvlm.ops.interval_attention import KEY_BLOCK
    from megatron_nvlm.ops.triton.interval_kernels import delta_kernel, forward_kernel, key_kernel, query_kernel
    from megatron_nvlm.ops.triton.interval_tiles import DELTA_ROWS, TILES, padded_head

    for head_size in HEAD_SIZES:
        tiles = TILES[capability][padded_head(head_size)]
        entries = {"ENTRY": KEY_BLOCK, "ENTRIES": max(tiles.key.keys // KEY_BLOCK, 1)}
        for kernel, tile, constants in (
            (forward_kernel, tiles.forward, {}),
            (query_kernel, tiles.query, {}),
            (key_kernel, tiles.key, entries),
        ):
            blocks = {"ROWS": tile.rows, "KEYS": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}
            sizes = {"HEAD": head_size, "WIDTH": padded_head(head_size), "PRECISION": "tf32"}
            yield kernel, f"interval {kernel.fn.__name__}, head {head_size}", {**blocks, **sizes, **constants}
        fixed = {"HEAD": head_size, "WIDTH": padded_head(head_size), "ROWS": DELTA_ROWS}
        yield delta_kernel, f"interval delta_kernel, head {head_size}", fixed


def _row_kernels() -> Iterator[tuple[Any, str, Mapping[str, Any]]]:
    """(kernel, name, constants) of kernels that read and write, and multiply no matrices."""
    from megatron_nvlm.ops.triton import gated_add, softmax_rows

    for module, kernels, constants in (
        (gated_add, ("_forward_kernel", "_backward_kernel"), {"BLOCK": gated_add.BLOCK, "num_warps": gated_add.WARPS}),
        (
            softmax_rows,
            ("_statistics_kernel", "_gradient_kernel"),
            {"COLUMNS": softmax_rows.COLUMNS, "num_warps": softmax_rows.WARPS},
        ),
    ):
        room = module.__name__.rpartition(".")[2].replace("_", " ")
        for kernel in kernels:
            yield getattr(module, kernel), f"{room} {kernel.strip('_')}", constants


def _type_of(name: str) -> str:
    """Triton's type of an argument."""
    is_number = any(name.startswith(part) or name.endswith(part) for part in _NUMBERS)
    return _TYPES.get(name, "i32" if is_number else "*bf16")


def main(arguments: Sequence[str]) -> None:
    """Print what each kernel needs, as JSON."""
    from megatron_nvlm.ops.triton.compiled import compile_kernel

    capability = int(arguments[0])
    found = []
    for kernel, name, constants in [*_interval_kernels(capability), *_row_kernels()]:
        names = list(inspect.signature(kernel.fn).parameters)
        fixed = {**constants, **{one: 1 for one in names if one.endswith("_column") and one != "first_column"}}
        types = {one: _type_of(one) for one in names if one not in fixed}
        made = compile_kernel(kernel, types, fixed, capability, name)
        found.append(
            {**asdict(made), "fits": made.fits(), "multiplies": name.startswith("interval") and "delta" not in name}
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
