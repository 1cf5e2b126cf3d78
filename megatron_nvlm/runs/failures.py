"""Word of what failed: a rank tells its launcher, the launcher of each node leaves a file, and one summary names the first.

A rank's sentence goes into the file that torchrun names in TORCHELASTIC_ERROR_FILE. `commands/launch_node.py` writes what
its torchrun saw to `RUN_DIR/failures/NODE.json`, also for a rank that was killed and said nothing.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import Signals

from megatron_nvlm.exit_codes import DETERMINISTIC
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.whole_files import write_whole

_CONSEQUENCES = (
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "closed by peer",
    "reset by peer",
    "Broken pipe",
)
"""Within the error of a rank that lost another one: torch's types, and what gloo says under RuntimeError."""
_ENDED_FROM_OUTSIDE = (-Signals.SIGTERM, -Signals.SIGABRT)
"""Exit codes of ranks that the launcher or NCCL ended, because another one had failed."""


@dataclass(frozen=True)
class RankFailure:
    """How one rank ended that did not end well."""

    rank: int
    node: str
    exit_code: int
    """Negative for a signal."""
    time: float
    """Of the clock on the wall, in seconds."""
    message: str
    """What it told; empty if it told nothing."""

    @property
    def is_consequence(self) -> bool:
        """Whether it failed because another rank or node did."""
        return self.exit_code in _ENDED_FROM_OUTSIDE or any(word in self.message for word in _CONSEQUENCES)

    def describe(self) -> str:
        """Within a sentence."""
        how = f"exit code {self.exit_code}"
        if self.exit_code < 0:
            how = f"killed by {Signals(-self.exit_code).name}"
        told = f": {self.message}" if self.message else ""
        return f"rank {self.rank} on {self.node} ({how}){told}"


@dataclass(frozen=True)
class NodeReport:
    """What the launcher of a node saw."""

    start: str
    """The start that it belongs to: JOB.RESTARTS."""
    node: str
    failures: tuple[RankFailure, ...]


def node_name() -> str:
    """This host as Slurm or Kubernetes calls it, else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or os.environ.get("NODE_NAME") or os.uname().nodename


def tell_launcher(message: str) -> None:
    """Give the launcher a message for its report; without one nothing happens."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        now = time.time()
        # The launcher reads whole seconds under `timestamp`; `time` is ours.
        content = {"message": message, "extraInfo": {"timestamp": str(int(now)), "time": now}}
        with suppress(OSError):  # it is printed already
            Path(file).write_text(json.dumps({"message": content}))


def write_report(run_dir: RunDir, report: NodeReport) -> None:
    """Leave a node's report, atomically.

    On a full disk, saves that were not completed make room: the ranks that wrote them have ended.

    Raises:
        OSError: it cannot be written.
    """
    try:
        _write_report(run_dir, report)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        for partial in run_dir.partial_saves:
            shutil.rmtree(partial, ignore_errors=True)
        _write_report(run_dir, report)


def _write_report(run_dir: RunDir, report: NodeReport) -> None:
    run_dir.failures.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir.failures / f"{report.node}.json", json.dumps(asdict(report)).encode())


def read_reports(run_dir: RunDir, start: str) -> list[NodeReport]:
    """The reports of a start; those of earlier ones and files cut short are left out."""
    reports = []
    for file in sorted(run_dir.failures.glob("*.json")):
        with suppress(ValueError, KeyError, TypeError):
            content = json.loads(file.read_text())
            content["failures"] = tuple(RankFailure(**failure) for failure in content["failures"])
            report = NodeReport(**content)
            if report.start == start:
                reports.append(report)
    return reports


def first_failure(reports: Sequence[NodeReport]) -> RankFailure | None:
    """The failure that explains the others.

    One that no start can avoid comes first, then the earliest that is not the consequence of another, then the earliest.
    """
    failures = [failure for report in reports for failure in report.failures]
    if not failures:
        return None
    return min(failures, key=lambda one: (one.exit_code not in DETERMINISTIC, one.is_consequence, one.time, one.rank))


def failed_nodes(reports: Sequence[NodeReport], nodes: Sequence[str]) -> tuple[str, ...]:
    """The nodes to blame for a start that failed: where the first failure was, else those that left no word.

    Where most nodes failed by themselves the cause is common, and none is to blame.

    Args:
        nodes: of the start. All silent is nobody's fault: the job was ended from outside.
    """
    by_themselves = {failure.node for report in reports for failure in report.failures if not failure.is_consequence}
    if len(by_themselves) > max(1, len(nodes) // 2):
        return ()
    first = first_failure(reports)
    if first is not None and not first.is_consequence:
        return (first.node,)
    silent = sorted(set(nodes) - {report.node for report in reports})
    return tuple(silent) if len(silent) < len(nodes) else ()
