"""Files that users name: a pipe would be waited for, and a device has no end, so each is one sentence."""

import stat
from pathlib import Path

from megatron_nvlm.errors import UserError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_whole(path: Path, what: str, most_bytes: int | None = None) -> bytes:
    """A regular file's bytes.

    Args:
        what: the file, as the sentence calls it.
        most_bytes: of a larger file nothing is read.

    Raises:
        UserError: it is no file, too large, or cannot be read.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device may have no end
            raise UserError(f"{what} is no file")
        if most_bytes is not None and found.st_size > most_bytes:
            raise UserError(f"{what} has over {most_bytes} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what} cannot be read ({getattr(error, 'strerror', None) or error})") from error


def check_regular(path: str | Path) -> None:
    """Refuse what is there and no regular file; what is missing is left to those who open it.

    Raises:
        UserError: it is a pipe, a device, a socket or a folder.
    """
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), None)
    if kind is not None:
        advice = "name a file in it" if kind == "a folder" else "write its content into a file and name that"
        raise UserError(f"{path} is {kind} and no file; {advice}")
