"""Whether a checkpoint's files are what was written: a manifest of sizes and CRC-32 sums, and its check before a load."""

import json
import zlib
from pathlib import Path
from typing import Literal, get_args

from torch.distributed.checkpoint.filesystem import FileSystemReader

Verify = Literal["size", "checksum"]
VERIFY_CHOICES = get_args(Verify)
IDENTITY_FILE = "nvlm.json"
MANIFEST_FILE = "manifest.json"
"""`{"files": {name: [bytes, CRC-32]}}` of every other file of the checkpoint."""
_SUMS_PREFIX = ".sums_"
_CHUNK_BYTES = 1 << 24

Manifest = dict[str, tuple[int, int]]
"""Name of a file -> its size in bytes, its CRC-32."""


def size_and_sum(path: Path) -> tuple[int, int]:
    """Read a file; its size in bytes and its CRC-32."""
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, checksum


def write_sums_of_rank(folder: Path, rank: int) -> None:
    """Put down the sums of what a rank wrote (core names its files `__RANK_NUMBER.distcp`), for `write_manifest`."""
    sums = {path.name: size_and_sum(path) for path in folder.glob(f"__{rank}_*")}
    (folder / f"{_SUMS_PREFIX}{rank}.json").write_text(json.dumps(sums))


def write_manifest(folder: Path) -> None:
    """Write the manifest of a complete folder, from the ranks' sums and, where there are none, from the files.

    Raises:
        OSError: a file that a rank wrote is not there, or the manifest cannot be written.
    """
    manifest: Manifest = {}
    for path in folder.glob(f"{_SUMS_PREFIX}*"):
        manifest |= json.loads(path.read_text())
        path.unlink()
    for path in folder.iterdir():
        if path.name not in manifest:
            manifest[path.name] = size_and_sum(path)
    for name in manifest:
        (folder / name).stat()
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": manifest}))


def find_damage(folder: Path, verify: str, share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with a checkpoint; empty if nothing is.

    A folder without a manifest (imported, or of an earlier version) is checked for readable metadata alone.

    Args:
        verify: `size` compares sizes, `checksum` reads every file as well.
        share: (k, n) to check every n-th file from the k-th on, where n ranks share the work.
    """
    if not folder.is_dir():
        return "the folder is not there"
    try:
        if "progress" not in json.loads((folder / IDENTITY_FILE).read_text()):
            return f"{IDENTITY_FILE} does not say how far it is"
        manifest: Manifest = {}
        if (folder / MANIFEST_FILE).exists():
            manifest = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        for name, (size, checksum) in sorted(manifest.items())[share[0] :: share[1]]:
            if damage := _damage_of_file(folder / name, size, checksum, verify):
                return damage
        if share[0] == 0:
            FileSystemReader(folder).read_metadata()
    except Exception as error:  # whatever a damaged pickle raises
        return f"its metadata cannot be read: {type(error).__name__}: {error}".splitlines()[0][:300]
    return ""


def _damage_of_file(path: Path, size: int, checksum: int, verify: str) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    found = path.stat().st_size
    if found != size:
        return f"{path.name} has {found} bytes instead of {size}"
    if verify == "checksum" and size_and_sum(path)[1] != checksum:
        return f"{path.name} has a wrong checksum"
    return ""
