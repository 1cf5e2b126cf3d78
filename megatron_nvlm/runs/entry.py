"""What entry points share: one sentence for a user's mistake, and one rank that speaks."""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_nvlm.errors import UserError


def global_rank() -> int:
    """This process's rank as the launcher announced it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def say(text: str) -> None:
    """Print, on rank 0."""
    if global_rank() == 0:
        print(text, flush=True)


def user_errors_end_the_process(main: Callable[..., None]) -> Callable[..., int]:
    """A `main` that returns 0, or 2 with one sentence on stderr for a mistake that the user can mend.

    Every rank reads the same files and meets the same mistake; all but rank 0 say their rank.
    """

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> int:
        try:
            main(arguments)
        except UserError as error:
            prefix = "" if global_rank() == 0 else f"rank {global_rank()}: "
            print(f"error: {prefix}{error}", file=sys.stderr, flush=True)
            _tell_launcher(str(error))
            return 2
        return 0

    return wrapped


def _tell_launcher(sentence: str) -> None:
    """Give torchrun the sentence for its own report, which is what the user reads last."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": f"error: {sentence}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):  # the sentence is printed already
            Path(file).write_text(json.dumps({"message": message}))
