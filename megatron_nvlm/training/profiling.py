"""`training.profile`: PyTorch's profiler over some steps, a trace file per chosen rank, a table of where the time went."""

import logging
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_nvlm.errors import UserError
from megatron_nvlm.parallel.ranges import PREFIX, RANGES
from megatron_nvlm.runs.run_dir import RunDir

logger = logging.getLogger(__name__)

SHOWN_OPERATIONS = 20
"""Rows of the table of operations."""


def parse_steps(text: str) -> range:
    """Steps as `training.profile` names them: "12" or "10-12", counted from 1, both ends included.

    Raises:
        UserError: it is neither.
    """
    found = re.fullmatch(r"([1-9]\d{0,11})(?:-([1-9]\d{0,11}))?", text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise UserError(f"training.profile is {text!r}; give a step, as 12, or a first and a last one, as 10-12")
    return range(first, last + 1)


def check_profile(steps: str | None, ranks: Sequence[int], world_size: int, train_steps: int | None) -> None:
    """Steps and ranks can be profiled.

    Args:
        train_steps: length of the run, where it is known.

    Raises:
        UserError: they cannot.
    """
    if steps is None:
        return
    first = parse_steps(steps)[0]
    if train_steps is not None and first > train_steps:
        raise UserError(f"training.profile begins at step {first} and training.train_steps is {train_steps}; lower it")
    if not ranks:
        raise UserError("training.profile_ranks is empty; name at least one rank, or set training.profile=null")
    for rank in ranks:
        if not 0 <= rank < world_size:
            raise UserError(f"training.profile_ranks names rank {rank} and the run has ranks 0 to {world_size - 1}")


class StepProfiler:
    """Profiles a stretch of steps on a chosen rank; elsewhere, and without such steps, it does nothing."""

    def __init__(
        self, steps: str | None, ranks: Iterable[int], rank: int, run_dir: RunDir, device: torch.device
    ) -> None:
        self._steps = parse_steps(steps) if steps is not None and rank in ranks else range(0)
        self._rank, self._folder, self._device = rank, run_dir.profile, device
        self._profile: Any = None
        self._first = self._last = 0
        self._began = 0.0

    def begin(self, step: int) -> None:
        """Call before a step; one that goes on after an interruption may be in the midst of the stretch."""
        if step not in self._steps or self._profile is not None:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()
        self._first, self._began = step, time.monotonic()

    def end(self, step: int) -> None:
        """Call after a step with all that belongs to it, a save too."""
        self._last = step
        if self._profile is not None and step >= self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write what was profiled, if anything; called again it does nothing. A run does not end by a full disk here."""
        if self._profile is None:
            return
        seconds, profiled, self._profile = time.monotonic() - self._began, self._profile, None
        profiled.stop()
        if self._last < self._first:  # the first step did not end
            return
        steps = f"{self._first}" if self._first == self._last else f"{self._first}-{self._last}"
        name = f"steps_{steps}_rank_{self._rank:05d}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            title = f"steps {steps} of rank {self._rank}"
            self._write_table(self._folder / f"{name}.txt", title, profiled.events(), seconds)
        except OSError as error:
            logger.warning("the profile of steps %s could not be written: %s", steps, error)

    def _write_table(self, path: Path, title: str, events: Sequence[Any], seconds: float) -> None:
        count = self._last - self._first + 1
        on_device = self._device.type == "cuda"
        lines = [f"where the time went: {title}, {seconds / count:.3f} s a step", ""]
        lines += ranges_table(own_seconds(events), seconds, count, on_device)
        lines += ["", *operations_table(events, count, on_device)]
        path.write_text("\n".join(lines) + "\n")


class Event(Protocol):
    """What is used of an event of the profiler."""

    name: str
    thread: int
    time_range: Any
    """With `start` and `end`, in microseconds."""


def own_seconds(events: Iterable[Event]) -> dict[str, float]:
    """Seconds in each range of a step, by name, without the ranges inside it."""
    marks = [event for event in events if event.name.startswith(PREFIX) and not _is_on_device(event)]
    own: Counter[str] = Counter()
    for thread in {event.thread for event in marks}:
        around: list[Event] = []
        mine = (event for event in marks if event.thread == thread)
        for event in sorted(mine, key=lambda event: (event.time_range.start, -event.time_range.end)):
            while around and around[-1].time_range.end <= event.time_range.start:
                around.pop()
            length = (event.time_range.end - event.time_range.start) / 1e6
            own[event.name.removeprefix(PREFIX)] += length
            if around:
                own[around[-1].name.removeprefix(PREFIX)] -= length
            around.append(event)
    return dict(own)


def _is_on_device(event: Any) -> bool:
    """A range has a shadow on the GPU's track of a trace; it is no time of the host's."""
    return getattr(getattr(event, "device_type", None), "name", "CPU") != "CPU"


def ranges_table(own: Mapping[str, float], seconds: float, steps: int, on_device: bool) -> list[str]:
    """Rows of the parts of a step; what no range covers is the last row."""
    clock = "host time; on a GPU a range is as long as the host needs or waits, see operations" if on_device else "time"
    lines = [f"{'part of a step':<24}{'s a step':>10}{'share':>8}   ({clock})"]
    rows = [*((name, own[name]) for name in RANGES if name in own), ("everything else", seconds - sum(own.values()))]
    for name, spent in rows:
        lines.append(f"{name:<24}{spent / steps:>10.4f}{spent / seconds if seconds else 0:>8.1%}")
    return lines


def operations_table(events: Iterable[Any], steps: int, on_device: bool) -> list[str]:
    """Rows of the operations that took longest in themselves, on the device where there is one."""
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.name.startswith(PREFIX) or (on_device and _is_on_device(event)):
            continue
        micros = event.self_device_time_total if on_device else event.self_cpu_time_total
        spent[event.name] += micros / 1e6
        calls[event.name] += 1
    total = sum(spent.values())
    where = "on the device" if on_device else "on the CPU"
    lines = [f"{'operation, ' + where:<56}{'s a step':>10}{'share':>8}{'calls a step':>14}"]
    for name, seconds in spent.most_common(SHOWN_OPERATIONS):
        share = seconds / total if total else 0
        lines.append(f"{_cut(name):<56}{seconds / steps:>10.4f}{share:>8.1%}{calls[name] / steps:>14.1f}")
    return lines


def _cut(name: str) -> str:
    return name if len(name) <= 55 else f"{name[:52]}..."
