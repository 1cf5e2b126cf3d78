"""Compiles a Triton kernel for a GPU that is not there, and says what the machine code needs of it."""

import inspect
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block may have, by compute capability (CUDA C++ programming guide)."""


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel's machine code for one GPU."""

    name: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_cores: str
    """wgmma, tcgen05, mma, or nothing."""

    def fits(self) -> bool:
        """Whether nothing spills and a block's shared memory is there."""
        return self.spilled_bytes == 0 and self.shared_bytes <= SHARED_MEMORY[self.capability]


def compile_kernel(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int, name: str = ""
) -> CompiledKernel:
    """Compile a kernel; needs no GPU.

    Args:
        kernel: made by `triton.jit`, not in Triton's interpreter.
        types: Triton's type of each argument that is no constant ("*bf16", "i32", "fp32"). Pointers count as aligned to 16
            bytes, and so do integers of a name that ends in `_row` or `_head` (strides).
        constants: values of the constants, `num_warps` and `num_stages` among them.
        capability: 80, 90 or 100.
    """
    options = {key: value for key, value in constants.items() if key in ("num_warps", "num_stages")}
    arguments = list(inspect.signature(kernel.fn).parameters)
    fixed = {(arguments.index(key),): value for key, value in constants.items() if key not in options}
    signature = {key: types.get(key, "constexpr") for key in arguments}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, key in enumerate(arguments)
        if signature[key].startswith("*") or key.endswith(("_row", "_head"))
    }
    source = ASTSource(kernel, signature, fixed, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assembly = made.asm["ptx"]
    registers, spilled = _resources(assembly, capability)
    return CompiledKernel(
        name or kernel.fn.__name__.strip("_"),
        capability,
        registers,
        spilled,
        made.metadata.shared,
        next((unit for unit in ("tcgen05.mma", "wgmma", "mma.sync") if unit in assembly), ""),
    )


def _resources(assembly: str, capability: int) -> tuple[int, int]:
    """Registers a thread and bytes that spill, as ptxas reports them."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if capability >= 100 and (blackwell := ptxas.with_name("ptxas-blackwell")).exists():
        ptxas = blackwell
    target = re.search(r"\.target (sm_\w+)", assembly)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(assembly)
        command = [str(ptxas), "-v", f"--gpu-name={target[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", told)
    spilled = re.search(r"(\d+) bytes spill stores", told)
    assert used is not None and spilled is not None, told
    return int(used[1]), int(spilled[1])
