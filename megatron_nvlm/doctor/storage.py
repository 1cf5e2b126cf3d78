"""The file system of the run, the shared memory and the clock of this node."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from megatron_nvlm.doctor.findings import Finding, bad, good

MEBIBYTE, GIBIBYTE = 2**20, 2**30
LEAST_SHARED_MEMORY = GIBIBYTE
"""Docker's default is 64 MiB, which loader processes and NCCL overrun; our choice of what is enough."""
LARGEST_SKEW_SECONDS = 2.0
"""Between this node's clock and another's or the file server's (our choice): logs and rendezvous compare times."""


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_speed(run_dir: Path, least_megabytes: float, size: int = 64 * MEBIBYTE) -> Finding:
    """Write a file beside the run, flush it to the disk, and read it back.

    Args:
        least_megabytes: a second, written.
    """
    folder = existing_parent(run_dir)
    content = os.urandom(MEBIBYTE)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor_") as file:
        began = time.perf_counter()
        for _ in range(size // MEBIBYTE):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        written = size / 1e6 / (time.perf_counter() - began)
        began = time.perf_counter()
        file.seek(0)
        while file.read(MEBIBYTE):
            pass
        read = size / 1e6 / (time.perf_counter() - began)
    seen = f"{folder}: {written:.0f} MB/s written and flushed, {read:.0f} MB/s read"
    if written < least_megabytes:
        return bad(
            "file system",
            f"{seen}, under {least_megabytes:g} MB/s (--least-megabytes): saves would take long; put run_dir on a faster "
            "file system",
        )
    return good("file system", seen)


def check_space(run_dir: Path, checkpoint_bytes: int, kept: int) -> Finding:
    """Room for the checkpoints that are kept and the one that is being written.

    Args:
        checkpoint_bytes: of one. kept: `checkpoint.keep_last`.
    """
    folder = existing_parent(run_dir)
    free, needed = shutil.disk_usage(folder).free, checkpoint_bytes * (kept + 1)
    seen = (
        f"{free / GIBIBYTE:.1f} GiB free in {folder}; {kept + 1} checkpoints of {checkpoint_bytes / GIBIBYTE:.1f} GiB"
    )
    if free < needed:
        return bad(
            "free space",
            f"{seen} need {needed / GIBIBYTE:.1f}; make room, or choose another run_dir or checkpoint.keep_last",
        )
    return good("free space", f"{seen} need {needed / GIBIBYTE:.1f}")


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """`/dev/shm`, through which processes of a node pass data."""
    if not folder.is_dir():
        return bad("shared memory", f"there is no {folder}; start the container with it (--ipc=host)", of_node=True)
    size = shutil.disk_usage(folder).total
    if size < LEAST_SHARED_MEMORY:
        return bad(
            "shared memory",
            f"{folder} has {size / MEBIBYTE:.0f} MiB and 1 GiB is needed; start the container with --ipc=host or "
            "--shm-size=16g",
            of_node=True,
        )
    return good("shared memory", f"{folder} has {size / GIBIBYTE:.1f} GiB")


def check_clock(run_dir: Path) -> Finding:
    """This node's clock against the one by which the run's file system dates files."""
    folder = existing_parent(run_dir)
    before = time.time()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor_") as file:
        file.write(b"1")
        file.flush()
        os.fsync(file.fileno())
        dated = os.stat(file.name).st_mtime
    # Between the two readings the file was written; file systems date to the second at worst.
    skew = max(before - 1 - dated, dated - time.time() - 1, 0.0)
    if skew > LARGEST_SKEW_SECONDS:
        return bad(
            "clock",
            f"this node's clock and the file system's of {folder} are {skew:.0f} s apart; set the clock (chrony or ntpd)",
            of_node=True,
        )
    return good("clock", f"agrees with the file system's of {folder}")
