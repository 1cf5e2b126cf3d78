"""Whether a run is at work, and how it ended if it is not, by the files of its directory; nothing is written or locked."""

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from megatron_nvlm.checkpoint.integrity import IDENTITY_FILE
from megatron_nvlm.checkpoint.retention import read_latest, step_of
from megatron_nvlm.errors import UserError
from megatron_nvlm.metrics_lines import LineFollower
from megatron_nvlm.runs.failures import RankFailure
from megatron_nvlm.runs.run_dir import RunDir

HEARTBEAT_SECONDS = 60
"""Age at which a heartbeat, renewed every few seconds, is a dead process's (our choice)."""
SILENT_SECONDS = 600
"""The same for metrics.jsonl of a run without a heartbeat on another host, where its run file does not say (our choice)."""

MOST = 1e11
"""Seconds and steps beyond it are no such thing."""


class Kind(StrEnum):
    """What a run does."""

    WAITING = "not begun"
    RUNNING = "running"
    STOPPED = "stopped"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class StartRow:
    """One start of a job (starts.jsonl)."""

    name: str
    began: float | None
    ended: float | None
    """On the clock on the wall, in seconds; None where it is not known."""
    ending: str
    """As runs/restart_policy.py names it; empty for one that has not ended."""
    first_step: int
    last_step: int | None
    failed_nodes: tuple[str, ...]


@dataclass(frozen=True)
class RunState:
    """A run at one moment."""

    kind: Kind
    sentence: str
    """What it does, or how it ended."""
    starts: tuple[StartRow, ...] = ()


def check_has_a_run(run_dir: RunDir) -> None:
    """Refuse a path that holds nothing of a run.

    Raises:
        UserError: it is missing, no directory, or has no file of a run.
    """
    if not run_dir.path.exists():
        raise UserError(f"there is no run directory {run_dir}; give the path that the run file has as run_dir")
    if not run_dir.path.is_dir():
        raise UserError(f"{run_dir} is a file; give the directory of a run")
    own = (run_dir.config, run_dir.metrics, run_dir.starts, run_dir.lock, run_dir.failure, run_dir.heartbeat)
    if not any(file.exists() for file in own):
        raise UserError(
            f"{run_dir} holds nothing of a run yet, neither config.yaml nor metrics.jsonl; start the run, or give the "
            "directory of another one"
        )


def read_config(run_dir: RunDir) -> dict[str, Any]:
    """The run file in force, as plain values; empty before the run has written it, or where it cannot be read."""
    with suppress(OSError, yaml.YAMLError):
        values = yaml.safe_load(run_dir.config.read_text())
        if isinstance(values, dict):
            return values
    return {}


def value_of(config: Mapping[str, Any], key: str) -> Any:
    """The value of `section.key`; None where it is not there."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def train_steps_of(run_dir: RunDir, config: Mapping[str, Any]) -> int | None:
    """Length of the run in steps; None where it is given in epochs and no checkpoint says how many steps they are."""
    steps = _number(value_of(config, "training.train_steps"))
    latest = read_latest(run_dir.checkpoints)
    if steps is None and latest is not None:
        settings = value_of(_read_object(latest / IDENTITY_FILE), "model.settings")
        steps = _number(settings.get("training.train_steps")) if isinstance(settings, Mapping) else None
    return None if steps is None or steps < 1 else int(steps)


def newest_checkpoint(run_dir: RunDir) -> int | None:
    """Step of the newest complete checkpoint; None without one."""
    latest = read_latest(run_dir.checkpoints)
    return step_of(latest) if latest is not None and step_of(latest) >= 0 else None


def read_state(run_dir: RunDir, config: Mapping[str, Any], last_step: int, now: float | None = None) -> RunState:
    """The state of a run.

    Args:
        config: as of `read_config`.
        last_step: of metrics.jsonl; 0 without one.
        now: on the clock on the wall, in seconds; by default the present moment.
    """
    now = time.time() if now is None else now
    starts = read_starts(run_dir)
    heartbeat = _read_object(run_dir.heartbeat)
    if _is_at_work(run_dir, config, heartbeat, now):
        return RunState(Kind.RUNNING, _doing(heartbeat, last_step, now), starts)
    if begun := _is_starting(run_dir, starts, now):
        return RunState(Kind.RUNNING, begun, starts)
    for kind, marker in ((Kind.FINISHED, run_dir.finished), (Kind.STOPPED, run_dir.stopped)):
        if marker.exists():
            step = marker.read_text().strip() or str(last_step)
            goes_on = "" if kind is Kind.FINISHED else "; the same command goes on from there"
            return RunState(kind, f"after step {step}{goes_on}", starts)
    if failure := _last_failure(run_dir, last_step):
        return RunState(Kind.FAILED, failure, starts)
    if not last_step and not run_dir.lock.exists():
        return RunState(Kind.WAITING, "no process has begun to train in this directory", starts)
    sentence = (
        f"ended after step {last_step} without a word, as a process that was killed; the same command goes on from the "
        "last checkpoint"
    )
    return RunState(Kind.FAILED, sentence, starts)


def _is_at_work(run_dir: RunDir, config: Mapping[str, Any], heartbeat: Mapping[str, Any], now: float) -> bool:
    """Whether a process trains here: by its number on this host, else by the age of what it writes."""
    holder = ""
    with suppress(OSError):
        holder = run_dir.lock.read_text()
    if found := re.fullmatch(r"(\d+) on (.+)\n?", holder):
        if found[2] == os.uname().nodename:
            return _is_training(int(found[1]))
    if beaten := _number(heartbeat.get("time")):
        return now - beaten < HEARTBEAT_SECONDS
    if not holder:
        return False
    limit = _number(value_of(config, "training.timeout_seconds")) or SILENT_SECONDS
    return any(now - changed < limit for changed in map(_changed, (run_dir.metrics, run_dir.lock)))


def _is_starting(run_dir: RunDir, starts: tuple[StartRow, ...], now: float) -> str:
    """A sentence about a job that has begun and whose ranks have not come yet; empty without one."""
    last = starts[-1] if starts else None
    if last is None or last.ending or last.began is None or _changed(run_dir.lock) > last.began:
        return ""
    age = now - last.began
    return f"start {last.name} began {age:.0f} s ago, its ranks are on their way" if age < SILENT_SECONDS else ""


def _is_training(process: int) -> bool:
    """Whether a process of this host lives and is one of this package; a number may have been given to another one."""
    try:
        return b"megatron_nvlm" in Path(f"/proc/{process}/cmdline").read_bytes()
    except FileNotFoundError:
        return False
    except OSError:  # of another user, or no Linux
        return True


def _changed(file: Path) -> float:
    with suppress(OSError):
        return file.stat().st_mtime
    return 0.0


def _doing(heartbeat: Mapping[str, Any], last_step: int, now: float) -> str:
    action, step = heartbeat.get("action"), heartbeat.get("step")
    if not isinstance(action, str):
        return f"at step {last_step + 1}" if last_step else "starting"
    ranks = f" on {heartbeat['ranks']} ranks" if isinstance(heartbeat.get("ranks"), int) else ""
    age = now - (_number(heartbeat.get("time")) or now)
    silence = f"; last heard of {age:.0f} s ago" if age > HEARTBEAT_SECONDS / 2 else ""
    return f"at step {step}{ranks}: {action}{silence}" if step else f"{action}{ranks}{silence}"


def _last_failure(run_dir: RunDir, last_step: int) -> str:
    """The first failure of the last start, in a sentence; empty if the last start left none."""
    content = _read_object(run_dir.failure)
    # One of an earlier start lies there still; metrics.jsonl has steps of the time after it then.
    if not content or _changed(run_dir.failure) < _changed(run_dir.metrics):
        return ""
    try:
        known = {name: content[name] for name in RankFailure.__dataclass_fields__}
        return f"in step {content.get('step', last_step + 1)}: {RankFailure(**known).describe()}"
    except (KeyError, TypeError, ValueError):
        return f"in step {last_step + 1}: {content.get('message') or 'failure.json says more'}"


def read_starts(run_dir: RunDir) -> tuple[StartRow, ...]:
    """The starts by jobs, in order; none of a run without jobs."""
    rows: dict[str, StartRow] = {}
    for line in LineFollower(run_dir.starts).read().records:
        for what in ("began", "ended"):
            content = line.get(what)
            if isinstance(content, dict) and isinstance(content.get("start"), str):
                name, at, nodes = content["start"], _number(content.get("time")), content.get("failed_nodes")
                before = rows.get(name) or StartRow(name, None, None, "", 0, None, ())
                rows[name] = StartRow(
                    name,
                    began=at if what == "began" else before.began,
                    ended=at if what == "ended" else None,
                    ending=str(content.get("ending", "")) if what == "ended" else "",
                    first_step=int(_number(content.get("first_step")) or 0),
                    last_step=int(_number(content.get("last_step")) or 0) if what == "ended" else None,
                    failed_nodes=tuple(map(str, nodes)) if isinstance(nodes, list) else (),
                )
    return tuple(rows.values())


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or half of one."""
    with suppress(OSError, ValueError):
        content = json.loads(file.read_text())
        if isinstance(content, dict):
            return content
    return {}


def _number(value: Any) -> float | None:
    """A number that a file may hold, of a size that times and steps have; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < MOST else None
