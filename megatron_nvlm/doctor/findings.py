"""What a check found, and the page of all of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_nvlm.errors import UserError


class Verdict(StrEnum):
    """Of one finding."""

    GOOD = "ok"
    NOTE = "note"
    """Nothing to mend, but worth knowing: not tested, not there."""
    BAD = "BAD"
    """The run would fail or lose work."""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    subject: str
    """One or two words: `versions`, `free space`."""
    verdict: Verdict
    sentence: str
    """What was seen; where it is bad, also how it is mended."""
    of_node: bool = False
    """Whether another node may do better, so that a job can go on without this one."""


def good(subject: str, sentence: str) -> Finding:
    """All is well."""
    return Finding(subject, Verdict.GOOD, sentence)


def note(subject: str, sentence: str) -> Finding:
    """Worth knowing."""
    return Finding(subject, Verdict.NOTE, sentence)


def bad(subject: str, sentence: str, of_node: bool = False) -> Finding:
    """To be mended."""
    return Finding(subject, Verdict.BAD, sentence, of_node)


def or_sentence(subject: str, check: Callable[[], Finding]) -> Finding:
    """The finding of a check; a mistake of the user's or a file system's error is one that is bad."""
    try:
        return check()
    except UserError as error:
        return bad(subject, str(error))
    except OSError as error:
        return bad(subject, f"{error}; mend the file system or its permissions")


def is_green(findings: Iterable[Finding]) -> bool:
    """Whether nothing has to be mended."""
    return all(finding.verdict is not Verdict.BAD for finding in findings)


def render(title: str, findings: Sequence[Finding]) -> str:
    """One page."""
    width = max((len(finding.subject) for finding in findings), default=0)
    lines = [f"{finding.verdict:4}  {finding.subject:{width}}  {finding.sentence}" for finding in findings]
    wrong = sum(finding.verdict is Verdict.BAD for finding in findings)
    last = "green: nothing to mend" if not wrong else f"{wrong} to mend, marked {Verdict.BAD}"
    return "\n".join([title, *lines, last])
