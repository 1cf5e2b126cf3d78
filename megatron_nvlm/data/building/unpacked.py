"""Files of many samples, to be read at any place: those that are compressed with gzip are unpacked first."""

import gzip
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from megatron_nvlm.errors import UserError
from megatron_nvlm.regular_files import check_regular


class OpenFile:
    """A file to be read at any place, by this process and those it forks.

    A file ending in .gz or .tgz is unpacked once, into a file without a name in the folder for temporary files (TMPDIR):
    gzip has no random access, and what has no name leaves nothing behind however the build ends.

    Raises:
        UserError: it is no regular file, or no whole gzip file.
    """

    def __init__(self, path: Path) -> None:
        check_regular(path)
        self._unpacked: BinaryIO | None = None
        self.path = path
        """Where to read; another than the user's if it was unpacked."""
        if path.suffix in (".gz", ".tgz"):
            self._unpacked = cast(BinaryIO, tempfile.TemporaryFile())
            try:
                with gzip.open(path) as packed:
                    shutil.copyfileobj(packed, self._unpacked, 1 << 20)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise UserError(f"{path} is no whole gzip file ({error}); copy it again, or unpack it") from error
            self._unpacked.flush()
            self.path = Path(f"/proc/self/fd/{self._unpacked.fileno()}")
