"""Whether a job goes back into the queue after a start: a pure function of all starts so far."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_nvlm.exit_codes import ENDED_WELL, NO_PROGRESS, TOO_MANY_FAILURES

FAILURES_TO_EXCLUDE = 2
"""A node that failed this often is excluded (our choice: one failure may be chance)."""
STARTS_WITHOUT_PROGRESS = 2
"""Starts in a row that may end at the step they began with before the job stops (our choice)."""


class Ending(StrEnum):
    """How a start ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    """Saved when asked: time limit, preemption or stop file."""
    DETERMINISTIC = "deterministic"
    """A mistake or a diverged loss: the same start would fail again."""
    FAILED = "failed"
    """A crash, a lost node or the watchdog."""


@dataclass(frozen=True)
class Start:
    """One start of a run."""

    ending: Ending
    first_step: int
    """Step of the checkpoint it began with; 0 without one."""
    last_step: int
    """Step of the newest complete checkpoint when it ended."""
    failed_nodes: tuple[str, ...] = ()
    exit_code: int = ENDED_WELL
    """Of the training program's first failure, negative for a signal; ENDED_WELL where none is known."""
    unfit_nodes: tuple[str, ...] = ()
    """Refused by the doctor before training; excluded at once."""


@dataclass(frozen=True)
class Decision:
    """What the job does next."""

    requeue: bool
    exit_code: int
    excluded_nodes: tuple[str, ...]
    """In the order of exclusion."""
    reason: str


def decide(starts: Sequence[Start], max_failures: int) -> Decision:
    """Decide after the last of these starts.

    Starts that stopped when asked are not limited as long as they make progress.

    Args:
        max_failures: failed starts after which the job is still queued again.

    Raises:
        ValueError: there was no start.
    """
    if not starts:
        raise ValueError("decide needs at least one start")
    excluded, since_exclusion = _exclusions(starts)
    last = starts[-1]
    if last.ending is Ending.FINISHED:
        return Decision(False, ENDED_WELL, excluded, f"the run is finished after step {last.last_step}")
    if last.ending is Ending.DETERMINISTIC:
        return Decision(False, last.exit_code, excluded, "the same start would fail again; see the error above")
    failures = sum(start.ending is Ending.FAILED for start in starts)
    if failures > max_failures:
        reason = f"{failures} starts failed and {max_failures} may; fix the cause, then submit the job again"
        return Decision(False, TOO_MANY_FAILURES, excluded, reason)
    recent = since_exclusion[-STARTS_WITHOUT_PROGRESS:]
    if len(recent) == STARTS_WITHOUT_PROGRESS and all(start.last_step <= start.first_step for start in recent):
        reason = f"{len(recent)} starts in a row saved nothing after step {last.last_step}; fix the cause first"
        return Decision(False, NO_PROGRESS, excluded, reason)
    return Decision(
        True, ENDED_WELL, excluded, f"the start {last.ending}; the next one resumes from step {last.last_step}"
    )


def _exclusions(starts: Sequence[Start]) -> tuple[tuple[str, ...], Sequence[Start]]:
    """Nodes to exclude, and the starts after the last exclusion: a bad node explains those before it.

    It does so once. Where the next starts save nothing either and name another node, the cause lies elsewhere.
    """
    failures: Counter[str] = Counter()
    excluded: list[str] = []
    begin, explained = 0, False
    for index, start in enumerate(starts):
        explained = explained and start.last_step <= start.first_step
        failures.update(set(start.failed_nodes))
        failures.update({node: FAILURES_TO_EXCLUDE for node in start.unfit_nodes})
        fresh = [n for n in sorted(failures) if failures[n] >= FAILURES_TO_EXCLUDE and n not in excluded]
        if fresh:
            excluded += fresh
            if not explained:
                begin, explained = index + 1, True
    return tuple(excluded), starts[begin:]
