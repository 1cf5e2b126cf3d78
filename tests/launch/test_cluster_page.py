"""The sentences that docs/clusters.md explains are those that the code says."""

import ast
import errno
import os
import re
from collections.abc import Iterator

import pytest

from megatron_nvlm.runs.entry import _MENDS
from tests.support.launch import REPOSITORY

PAGE = (REPOSITORY / "docs" / "clusters.md").read_text()
TABLE = PAGE.split("## What you see", 1)[1]
GAP = "\0"
"""Stands for what a sentence fills in."""
SEEN = re.findall(r"^\| `([^`]*)` \|", TABLE, re.MULTILINE)
OTHERS = ("Bus error",)
"""What other programs say."""


def texts() -> Iterator[str]:
    """Every string of the package, with gaps for values, and the lines of the job scripts."""
    for path in sorted((REPOSITORY / "megatron_nvlm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    yield re.sub(r"\$\{?\w+\}?", GAP, (REPOSITORY / "launch" / "common.sh").read_text())


@pytest.fixture(scope="module")
def said() -> list[str]:
    # What the system says comes within a sentence of runs/entry.py; a signal's name within one of runs/failures.py.
    full, denied = os.strerror(errno.ENOSPC), os.strerror(errno.EACCES)
    return [
        *texts(),
        f"{full}; {_MENDS[errno.ENOSPC]}",
        f"{GAP}: {denied}; {_MENDS[errno.EACCES]}",
    ]


@pytest.mark.parametrize("sentence", [sentence for sentence in SEEN if not sentence.startswith(OTHERS)])
def test_the_page_explains_what_the_code_says(sentence: str, said: list[str]) -> None:
    fragments = [fragment.strip(" :;,().") for fragment in re.split("…|SIGKILL", sentence)]
    fragments = [fragment for fragment in fragments if len(fragment) > 3]
    assert fragments, sentence
    for fragment in fragments:
        assert any(fragment in text for text in said), f"nothing says {fragment!r}"


def test_the_table_was_read() -> None:
    assert len(SEEN) > 20
