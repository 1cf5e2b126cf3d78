"""Numbers that ranks report by name, and how they become one number per name over all ranks.

A new metric is one line where ranks report (training/metrics.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist


class Reduce(Enum):
    """How the values of the ranks that report a metric become one."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"


@dataclass(frozen=True)
class Metric:
    """One rank's value of a metric."""

    name: str
    value: float
    reduce: Reduce


class MetricReducer:
    """Merges the ranks' metrics by name. Ranks may report different names, but each rank the same ones every time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: dict[str, Reduce] = {}
        """Of all ranks, sorted: exchanged before the first merge."""

    def merge(self, metrics: Sequence[Metric]) -> dict[str, float]:
        """One number per name, in two collectives that every rank joins.

        Raises:
            ValueError: this rank reports a name that no rank reported before.
        """
        if not self._names:
            self._names = self._exchange_names(metrics)
        places = {name: place for place, name in enumerate(self._names)}
        sums = torch.zeros(2, len(places), dtype=torch.float64)  # value, ranks that report it
        largest = torch.full((len(places),), -math.inf, dtype=torch.float64)
        for metric in metrics:
            if self._names.get(metric.name) is not metric.reduce:
                raise ValueError(f"the metric {metric.name} ({metric.reduce.value}) was not reported in the first step")
            place = places[metric.name]
            sums[:, place] += torch.tensor([metric.value, 1.0], dtype=torch.float64)
            largest[place] = max(largest[place].item(), metric.value)
        sums, largest = sums.to(self._device), largest.to(self._device)
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        totals, counts = sums.tolist()
        of_reduce = {
            Reduce.SUM: totals,
            Reduce.MEAN: [total / max(count, 1.0) for total, count in zip(totals, counts, strict=True)],
            Reduce.MAX: largest.tolist(),
        }
        return {name: of_reduce[reduce][places[name]] for name, reduce in self._names.items()}

    @staticmethod
    def _exchange_names(metrics: Sequence[Metric]) -> dict[str, Reduce]:
        shares: list[dict[str, Reduce]] = [{}] * dist.get_world_size()
        dist.all_gather_object(shares, {metric.name: metric.reduce for metric in metrics})
        every = {name: reduce for share in shares for name, reduce in share.items()}
        return {name: every[name] for name in sorted(every)}
