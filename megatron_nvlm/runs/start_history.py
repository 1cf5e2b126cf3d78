"""The starts of a run by jobs, kept in its directory: what each began with, how it ended, and what became of its nodes.

Training writes nothing here. `commands/job_start.py` does, on behalf of the job scripts, before and after each start. A
start that was killed with its job has no end; the next one works it out from what the killed one left behind.
"""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_nvlm.checkpoint.retention import read_latest, step_of
from megatron_nvlm.exit_codes import DETERMINISTIC, ENDED_WELL, USER_ERROR
from megatron_nvlm.runs.failures import RankFailure, failed_nodes, first_failure, read_reports
from megatron_nvlm.runs.restart_policy import Ending, Start
from megatron_nvlm.runs.run_dir import RunDir


@dataclass(frozen=True)
class Beginning:
    """What is known of a start before it runs."""

    start: str
    """Name of the start: JOB.RESTARTS."""
    job: str
    """The submission that it belongs to: all of its restarts, or the whole chain. A new submission counts anew."""
    nodes: tuple[str, ...]
    first_step: int
    marks: dict[str, int]
    """Times of change, in nanoseconds, of the markers that earlier starts left."""
    time: float


def newest_step(run_dir: RunDir) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    latest = read_latest(run_dir.checkpoints)
    return max(step_of(latest), 0) if latest is not None else 0


def begin(run_dir: RunDir, start: str, job: str, nodes: Sequence[str]) -> None:
    """Write down that a start begins."""
    beginning = Beginning(start, job, tuple(nodes), newest_step(run_dir), _marks(run_dir), time.time())
    _append(run_dir, {"began": asdict(beginning)})


def end(run_dir: RunDir, beginning: Beginning, status: int | None, asked: bool) -> tuple[Start, RankFailure | None]:
    """Write down how a start ended, with its first failure if there was one.

    Args:
        status: exit status of all its processes together; None where it is not known, since the job was killed with them.
        asked: whether it was asked to stop.
    """
    changed = {name for name, changed_at in _marks(run_dir).items() if beginning.marks.get(name) != changed_at}
    reports = read_reports(run_dir, beginning.start)
    first = first_failure(reports)
    well = status in (0, None)
    if well and run_dir.finished.name in changed:
        ending = Ending.FINISHED
    elif first is not None and first.exit_code in DETERMINISTIC:
        ending = Ending.DETERMINISTIC
    elif asked or (well and run_dir.stopped.name in changed):
        ending = Ending.STOPPED
    else:
        ending = Ending.FAILED
    failed = ending in (Ending.FAILED, Ending.DETERMINISTIC)
    start = Start(
        ending,
        beginning.first_step,
        newest_step(run_dir),
        failed_nodes(reports, beginning.nodes) if ending is Ending.FAILED else (),
        first.exit_code if failed and first is not None else ENDED_WELL,
    )
    _append_end(run_dir, beginning, start)
    if failed and first is not None:
        run_dir.failure.write_text(
            json.dumps({"start": beginning.start, "step": _step_begun(run_dir), **asdict(first)})
        )
    return start, first if failed else None


def end_unfit(run_dir: RunDir, beginning: Beginning, status: int) -> Start:
    """Write down that a start ended before training, since the doctor found something wrong.

    Args:
        status: the doctor's; only UNFIT_NODES is mended by other nodes.
    """
    began, step = beginning.first_step, newest_step(run_dir)
    pages = [line for line in _lines(run_dir.preflight) if line.get("start") == beginning.start]
    if status == USER_ERROR:
        start = Start(Ending.DETERMINISTIC, began, step, exit_code=status)
    elif pages:
        start = Start(Ending.FAILED, began, step, exit_code=status, unfit_nodes=tuple(pages[-1]["unfit_nodes"]))
    else:  # a node was lost before the doctor had spoken
        blamed = failed_nodes(read_reports(run_dir, beginning.start), beginning.nodes)
        start = Start(Ending.FAILED, began, step, blamed, status)
    _append_end(run_dir, beginning, start)
    return start


def _append_end(run_dir: RunDir, beginning: Beginning, start: Start) -> None:
    _append(run_dir, {"ended": {"start": beginning.start, "time": time.time(), **asdict(start)}})


def starts_of(run_dir: RunDir, job: str) -> tuple[list[Start], Beginning | None]:
    """The starts of a submission that ended, and the last one if it did not."""
    began: dict[str, Beginning] = {}
    ended: list[Start] = []
    for line in _lines(run_dir.starts):
        if content := line.get("began"):
            beginning = Beginning(**{**content, "nodes": tuple(content["nodes"])})
            if beginning.job == job:
                began[beginning.start] = beginning
        elif content := line.get("ended"):
            if began.pop(content["start"], None) is not None:
                known = {key: value for key, value in content.items() if key not in ("start", "time")}
                known["ending"], known["failed_nodes"] = Ending(known["ending"]), tuple(known["failed_nodes"])
                known["unfit_nodes"] = tuple(known.get("unfit_nodes", ()))
                ended.append(Start(**known))
    return ended, list(began.values())[-1] if began else None


def _marks(run_dir: RunDir) -> dict[str, int]:
    marks = {}
    for file in (run_dir.finished, run_dir.stopped):
        with suppress(FileNotFoundError):
            marks[file.name] = file.stat().st_mtime_ns
    return marks


def _step_begun(run_dir: RunDir) -> int:
    """The step after the last one written down: the one in which a run failed."""
    return max((line["step"] for line in _lines(run_dir.metrics)), default=0) + 1


def _lines(file: Path) -> list[dict]:
    """Lines of JSON; one that was cut short by a kill or a full disk is left out."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else ():
        with suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def _append(run_dir: RunDir, content: dict) -> None:
    run_dir.path.mkdir(parents=True, exist_ok=True)
    with run_dir.starts.open("a+") as file:
        file.seek(0, 2)
        if file.tell():
            file.seek(file.tell() - 1)
            if file.read(1) != "\n":  # a line that was cut short
                file.write("\n")
        file.write(json.dumps(content) + "\n")
