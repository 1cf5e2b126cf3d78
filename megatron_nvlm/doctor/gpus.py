"""The GPUs of this node: what the driver says of them, DCGM's own check, and how fast one multiplies."""

import shutil
import subprocess
import time
from collections.abc import Iterator

import torch

from megatron_nvlm.doctor.findings import Finding, bad, good, note
from megatron_nvlm.parallel.device import wait_for

_FIELDS = (
    "name",
    "driver_version",
    "ecc.errors.uncorrected.volatile.total",
    "clocks.sm",
    "clocks.max.sm",
    "temperature.gpu",
)
_DCGM_SECONDS = 300
_PRODUCTS, _ROWS = 20, {"cuda": 8192, "cpu": 512}
HOT = 88
"""Degrees Celsius from which data-centre GPUs slow down (our choice, below the 90 of their data sheets)."""


def check_gpus() -> Iterator[Finding]:
    """What `nvidia-smi` and, where it is installed, `dcgmi` say."""
    if shutil.which("nvidia-smi") is None:
        yield note("GPUs", "there is no nvidia-smi on this node")
        return
    asked = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        yield bad(
            "GPUs", f"nvidia-smi failed: {said[0] if said else done.returncode}; have the node looked at", of_node=True
        )
        return
    yield from read_gpus(done.stdout)
    yield from _dcgm()


def read_gpus(table: str) -> Iterator[Finding]:
    """Findings of the lines that `nvidia-smi` prints, one a GPU."""
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.strip()]
    names = sorted({row[0] for row in rows})
    wrong = False
    if len(names) > 1:
        wrong = True
        yield bad("GPUs", f"this node mixes {', '.join(names)}; use nodes of one kind", of_node=True)
    for number, (_, _, errors, _, _, degrees) in enumerate(rows):
        if errors.isdigit() and int(errors):
            wrong = True
            yield bad(
                "GPUs",
                f"GPU {number} has {errors} uncorrected ECC errors; have the node drained and reset",
                of_node=True,
            )
        if degrees.isdigit() and int(degrees) >= HOT:
            wrong = True
            yield bad(
                "GPUs", f"GPU {number} has {degrees} degrees Celsius at rest; have its cooling looked at", of_node=True
            )
    if not wrong:
        clocks = sorted({row[4] for row in rows})
        yield good(
            "GPUs",
            f"{len(rows)} x {names[0]}, driver {rows[0][1]}, clocks up to {', '.join(clocks)} MHz, no ECC errors",
        )


def _dcgm() -> Iterator[Finding]:
    if shutil.which("dcgmi") is None:
        return
    try:
        done = subprocess.run(["dcgmi", "diag", "-r", "1"], capture_output=True, text=True, timeout=_DCGM_SECONDS)
    except subprocess.TimeoutExpired:
        yield bad(
            "DCGM", f"dcgmi diag -r 1 did not end within {_DCGM_SECONDS} s; have the node looked at", of_node=True
        )
        return
    if done.returncode:
        failed = [line.strip(" |") for line in done.stdout.splitlines() if "Fail" in line]
        said = "; ".join(failed) or f"exit status {done.returncode}"
        yield bad("DCGM", f"dcgmi diag -r 1: {said}; have the node looked at", of_node=True)
    else:
        yield good("DCGM", "dcgmi diag -r 1 passed")


def run_command(command: str, seconds: float = _DCGM_SECONDS) -> Finding:
    """A cluster's own check, as Meta's `health_checks` of gpucm: good if it ends with 0."""
    try:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return bad("own check", f"`{command}` did not end within {seconds:g} s", of_node=True)
    said = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        return bad(
            "own check",
            f"`{command}` ended with {done.returncode}: {said[-1] if said else 'nothing said'}",
            of_node=True,
        )
    return good("own check", f"`{command}` passed")


def multiply(device: torch.device) -> float:
    """TFLOP/s of square matrix products on a device: bf16 on a GPU, fp32 on a CPU."""
    rows, dtype = _ROWS[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.randn(rows, rows, device=device, dtype=dtype)

    def products() -> float:
        began = time.perf_counter()
        for _ in range(_PRODUCTS):
            torch.mm(matrix, matrix)
        wait_for(device)
        return time.perf_counter() - began

    products()  # the first ones choose a kernel
    return 2 * rows**3 * _PRODUCTS / products() / 1e12
