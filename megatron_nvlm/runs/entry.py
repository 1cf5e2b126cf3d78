"""What entry points share: one sentence for a user's mistake, and one rank that speaks."""

import errno
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_nvlm.errors import UserError
from megatron_nvlm.exit_codes import USER_ERROR

_MENDS = {
    errno.ENOSPC: "make room and start again",
    errno.EDQUOT: "make room and start again",
    errno.EROFS: "name a folder that can be written to",
    errno.EACCES: "have its permissions changed, or name another one",
    errno.EPERM: "have its permissions changed, or name another one",
    errno.EEXIST: "move it away, or name another one",
    errno.ENOTDIR: "a part of the path is no folder; name another one",
    errno.EISDIR: "name a file",
    errno.ENOENT: "correct the path",
}
"""What a user can do about an error of the file system."""


def global_rank() -> int:
    """This process's rank as the launcher announced it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def say(text: str) -> None:
    """Print, on rank 0."""
    if global_rank() == 0:
        print(text, flush=True)


def user_errors_end_the_process(main: Callable[..., None]) -> Callable[..., int]:
    """A `main` that returns 0, or 2 with one sentence on stderr for a mistake or a file system that the user can fix.

    Every rank reads the same files and meets the same mistake; all but rank 0 say their rank.
    """

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> int:
        try:
            main(arguments)
        except (UserError, OSError) as error:
            sentence = str(error) if isinstance(error, UserError) else _file_system_sentence(error)
            if not sentence:
                raise
            prefix = "" if global_rank() == 0 else f"rank {global_rank()}: "
            print(f"error: {prefix}{sentence}", file=sys.stderr, flush=True)
            _tell_launcher(sentence)
            return USER_ERROR
        return 0

    return wrapped


def _file_system_sentence(error: OSError) -> str:
    """What was met, where, and how to fix it; nothing for an error that is not the file system's."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # a write that fails does not say where
    if error.errno not in _MENDS or (error.filename is None and not is_full):
        return ""
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror}; {_MENDS[error.errno]}"


def _tell_launcher(sentence: str) -> None:
    """Give torchrun the sentence for its own report, which is what the user reads last."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": f"error: {sentence}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):  # the sentence is printed already
            Path(file).write_text(json.dumps({"message": message}))
