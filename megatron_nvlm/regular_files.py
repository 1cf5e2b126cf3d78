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
        raise UserError(f"{path} is {kind} and no file; write its content into a file and name that")
