"""The steps of a run in memory, one column of numbers for each metric."""

import math
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_nvlm.metrics_lines import LineFollower, is_step, numbers_of
from megatron_nvlm.runs.run_dir import RunDir


class History:
    """The steps of a run; `refresh` reads what was appended since."""

    def __init__(self, run_dir: RunDir) -> None:
        self._file = LineFollower(run_dir.metrics)
        self._clear()

    def _clear(self) -> None:
        self.steps = array("q")
        """Numbers of the steps, rising."""
        self._columns: dict[str, array] = {}
        self.skipped: list[tuple[int, str]] = []
        """Steps whose update was left out, and why."""
        self.stragglers: list[tuple[int, list[dict[str, Any]]]] = []
        """Steps at which slow ranks were named, and these."""
        self.peak_memory_of = ""
        """device or process: whose memory `peak_memory_gib` is."""

    def refresh(self) -> bool:
        """Read on; returns whether anything has changed."""
        news = self._file.read()
        if news.begins_again:
            self._clear()
        for record in news.records:
            if is_step(record):
                self._add(record)
        return bool(news.records) or news.begins_again

    def _add(self, record: Mapping[str, Any]) -> None:
        step = int(record["step"])
        if self.steps and step <= self.steps[-1]:  # a file that was put together by hand
            return
        numbers = numbers_of(record)
        del numbers["step"]
        for name in numbers.keys() - self._columns.keys():
            self._columns[name] = array("d", [math.nan] * len(self.steps))
        self.steps.append(step)
        for name, column in self._columns.items():
            column.append(numbers.get(name, math.nan))
        if record.get("skipped"):
            self.skipped.append((step, str(record["skipped"])))
        if record.get("peak_memory_of") in ("device", "process"):
            self.peak_memory_of = record["peak_memory_of"]
        slow = record.get("stragglers")
        if isinstance(slow, list) and slow:
            self.stragglers.append((step, [one for one in slow if isinstance(one, dict)]))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def names(self) -> list[str]:
        """Metrics that any step has."""
        return sorted(self._columns)

    def column(self, name: str) -> array:
        """A metric by step; NaN in steps without it."""
        return self._columns.get(name) or array("d", [math.nan] * len(self.steps))

    def last(self, name: str) -> float:
        """The last value that is there; NaN without one."""
        return next((value for value in reversed(self.column(name)) if not math.isnan(value)), math.nan)

    @property
    def gates(self) -> list[str]:
        """Metrics of the gates, by layer."""
        names = [name for name in self.names if name.startswith("gates/")]
        return sorted(names, key=lambda name: int("".join(filter(str.isdecimal, name)) or 0))

    def total(self, name: str, last_steps: int | None = None) -> float:
        """Sum over all steps or the last ones; steps without the metric count nothing."""
        column = self.column(name)
        return sum(present(column[-last_steps:] if last_steps else column))


def present(values: Iterable[float]) -> list[float]:
    """Values without those that are no finite number."""
    return [value for value in values if math.isfinite(value)]
