"""Compiles the kernels of interval attention for a GPU that is not there: `python -m tests.support.compile_interval 90`.

A process of its own, since Triton decides at its import whether kernels are compiled or interpreted.
"""

import inspect
import json
import sys
from dataclasses import asdict
from typing import Any

from megatron_nvlm.ops.interval_attention import KEY_BLOCK
from megatron_nvlm.ops.triton.compiled import CompiledKernel, compile_kernel
from megatron_nvlm.ops.triton.interval_kernels import forward_kernel, key_kernel, query_kernel
from megatron_nvlm.ops.triton.interval_tiles import TILES, Tile, padded_head

TYPES = {"intervals": "*i32", "block_rows": "*i32", "lse": "*fp32", "delta": "*fp32", "scale": "fp32"}
TYPES["score_scale"] = "fp32"
NUMBERS = ("_row", "_head", "num_", "heads", "groups", "parts")
"""Beginnings and ends of integers; constants are upper case, strides of columns are 1, and all else is a matrix."""


def type_of(name: str) -> str:
    """Triton's type of an argument."""
    is_number = any(name.startswith(part) or name.endswith(part) for part in NUMBERS)
    return TYPES.get(name, "i32" if is_number or name.startswith("parts_") else "*bf16")


def compile_tile(kernel: Any, head_size: int, tile: Tile, capability: int, constants: dict[str, int]) -> CompiledKernel:
    """One kernel with the blocks that the package chooses."""
    names = list(inspect.signature(kernel.fn).parameters)
    fixed = {"HEAD": head_size, "WIDTH": padded_head(head_size), "ROWS": tile.rows, "KEYS": tile.keys, **constants}
    fixed |= {"PRECISION": "tf32", "num_warps": tile.warps, "num_stages": tile.stages}
    fixed |= {name: 1 for name in names if name.endswith("_column")}
    types = {name: type_of(name) for name in names if name not in fixed}
    return compile_kernel(kernel, types, fixed, capability, f"{kernel.fn.__name__}, head {head_size}")


def main() -> None:
    """Print what each kernel needs, as JSON."""
    capability = int(sys.argv[1])
    found = []
    for head_size in (64, 128):
        tiles = TILES[capability][padded_head(head_size)]
        entries = {"ENTRY": KEY_BLOCK, "ENTRIES": tiles.key.keys // KEY_BLOCK}
        for kernel, tile, constants in (
            (forward_kernel, tiles.forward, {}),
            (query_kernel, tiles.query, {}),
            (key_kernel, tiles.key, entries),
        ):
            made = compile_tile(kernel, head_size, tile, capability, constants)
            found.append({**asdict(made), "fits": made.fits()})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
