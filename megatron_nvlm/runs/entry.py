"""What entry points share: one sentence for a user's mistake, and one rank that speaks."""

import errno
import functools
import os
import sys
import time
from collections.abc import Callable

from megatron_nvlm.errors import UserError
from megatron_nvlm.exit_codes import USER_ERROR
from megatron_nvlm.runs.failures import node_name, tell_launcher
from megatron_nvlm.runs.run_dir import RunDir

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


def print_to_rank_file(run_dir: RunDir) -> None:
    """Let what this rank prints from now on go to a file of its own; rank 0 goes on printing where it does.

    The launcher still gets a failure's sentence (`tell_launcher`), and its log names the first one.
    """
    rank = global_rank()
    if rank == 0:
        return
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # By number, so that libraries that print without Python's streams are caught as well.
    file = os.open(run_dir.logs / f"rank_{rank:05d}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    start = os.environ.get("TORCHELASTIC_RUN_ID", "")
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank} on {node_name()}, start {start}", flush=True)


def user_errors_end_the_process(main: Callable[..., None]) -> Callable[..., int]:
    """A `main` that returns an exit code: 0, or that of what the user can fix (mistake, file system), said in one sentence.

    Every rank reads the same files and meets the same mistake; all but rank 0 say their rank. Any other error is raised,
    and the launcher's report has its last line.
    """

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> int:
        try:
            main(arguments)
        except Exception as error:
            sentence = _sentence(error)
            if not sentence:
                tell_launcher(f"{type(error).__name__}: {error}")
                raise
            prefix = "" if global_rank() == 0 else f"rank {global_rank()}: "
            print(f"error: {prefix}{sentence}", file=sys.stderr, flush=True)
            tell_launcher(f"error: {sentence}")
            return error.exit_code if isinstance(error, UserError) else USER_ERROR
        return 0

    return wrapped


def _sentence(error: Exception) -> str:
    """What the user can do about it; nothing for an error that is not the user's."""
    if isinstance(error, UserError):
        return str(error)
    return _file_system_sentence(error) if isinstance(error, OSError) else ""


def _file_system_sentence(error: OSError) -> str:
    """What was met, where, and how to fix it; nothing for an error that is not the file system's."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # a write that fails does not say where
    if error.errno not in _MENDS or (error.filename is None and not is_full):
        return ""
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror}; {_MENDS[error.errno]}"
