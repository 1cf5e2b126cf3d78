"""HumanEval: whether a function that the model wrote passes the tests of its question. This runs the model's code.

The code runs in a process of its own with limits of time and memory, and away from the working directory. That is no
sandbox: run it where nothing is lost.
"""

import re
import resource
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10
_BYTES = 4 << 30
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def passes_tests(answer: str, question: str, tests: str, entry_point: str, seconds: float = SECONDS) -> float:
    """1 if `check(function)` of the tests ends without an error in time.

    Args:
        answer: a whole function, in a block of code or alone, or what follows the question.
        question: the beginning of the function: imports, signature, docstring.
        entry_point: the function's name.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Written last under a name that the code cannot know: code that ends the process early has not passed.
        passed = Path(folder) / secrets.token_hex(16)
        ending = f"check({entry_point})\nopen({str(passed)!r}, 'x').close()\n"
        program = f"{program_of(answer, question, entry_point)}\n\n{tests}\n\n{ending}"
        try:
            subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
                preexec_fn=_limit,
            )
        except (subprocess.TimeoutExpired, ValueError, OSError):  # too long, or no text for a command line
            return 0.0
        return float(passed.exists())


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS * 2, SECONDS * 2))


def program_of(answer: str, question: str, entry_point: str) -> str:
    """The function as a program: an answer that defines it, after the question's imports; else question and answer."""
    block = _BLOCK.search(answer)
    code = block[1] if block else answer
    if re.search(rf"^def {re.escape(entry_point)}\b", code, re.MULTILINE):
        return f"{question[: question.rfind(f'def {entry_point}')]}\n{code}"
    return f"{question.rstrip()}\n{code}"
