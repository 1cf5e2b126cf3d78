"""Files of many samples, to be read at any place: those that are compressed (gzip, zstd) are unpacked first."""

import gzip
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_nvlm.errors import UserError
from megatron_nvlm.regular_files import check_regular

GZIP_SUFFIXES = (".gz", ".tgz")
ZSTD_SUFFIXES = (".zst", ".tzst")
_AT_ONCE = 1 << 20


class OpenFile:
    """A file to be read at any place, by this process and those it forks.

    A compressed file is unpacked once, into a file without a name in the folder for temporary files (TMPDIR): it has no
    random access, and what has no name leaves nothing behind however the build ends.

    Raises:
        UserError: it is no regular file, no whole file of its kind, or zstd cannot be read here.
    """

    def __init__(self, path: Path) -> None:
        check_regular(path)
        self._unpacked: BinaryIO | None = None
        self.path = path
        """Where to read; another than the user's if it was unpacked."""
        if path.suffix in (*GZIP_SUFFIXES, *ZSTD_SUFFIXES):
            self._unpacked = cast(BinaryIO, tempfile.TemporaryFile())
            (_unpack_gzip if path.suffix in GZIP_SUFFIXES else _unpack_zstd)(path, self._unpacked)
            self._unpacked.flush()
            self.path = Path(f"/proc/self/fd/{self._unpacked.fileno()}")


def _unpack_gzip(path: Path, target: BinaryIO) -> None:
    try:
        with gzip.open(path) as packed:
            shutil.copyfileobj(packed, target, _AT_ONCE)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no whole gzip file ({error}); copy it again, or unpack it") from error


def _unpack_zstd(path: Path, target: BinaryIO) -> None:
    """By pyarrow, which tables need too; it reads several frames, and notices a file that is cut off."""
    packed: Any
    try:
        from pyarrow import CompressedInputStream
    except ImportError as error:
        raise UserError(
            f"{path} is compressed with zstd, which needs pyarrow; pip install pyarrow, or unpack it"
        ) from error
    try:
        with path.open("rb") as file, CompressedInputStream(file, "zstd") as packed:
            while part := packed.read(_AT_ONCE):
                target.write(part)
    except OSError as error:
        if error.errno is not None:  # of the file system
            raise
        raise UserError(f"{path} is no whole zstd file ({error}); copy it again, or unpack it") from error
