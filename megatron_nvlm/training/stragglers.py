"""Ranks that are slower than the others, named with their node.

All ranks end a step together, so the time of a step names nobody. What is compared is the time that a rank's replica needs
until its gradients are ready, before it waits for others; reading of data counts. With tensor or pipeline parallelism
the ranks of a replica wait for each other within that time: then all ranks of the slow replica are named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_nvlm.runs.failures import node_name

SLOW = 0.7
"""A rank below this part of its peers' speed is named (our choice)."""


@dataclass(frozen=True)
class Straggler:
    """A slow rank."""

    rank: int
    node: str
    seconds: float
    """A step until its gradients are ready."""
    median: float
    """Of its data-parallel peers."""

    def describe(self, steps: int) -> str:
        """A sentence."""
        return (
            f"slow: rank {self.rank} on {self.node} takes {self.seconds:.3g} s a step until its gradients are ready, its "
            f"data-parallel peers {self.median:.3g} s (median; means of {steps} steps)"
        )


def find_stragglers(
    seconds: Sequence[float], nodes: Sequence[str], places: Sequence[tuple[int, int]]
) -> list[Straggler]:
    """Ranks slower than `SLOW` of the median of their peers.

    Args:
        seconds, nodes: by rank. places: of each rank within its replica; ranks of one place are peers.
    """
    found = []
    for rank, (own, place) in enumerate(zip(seconds, places, strict=True)):
        peers = [other for number, other in enumerate(seconds) if places[number] == place and number != rank]
        if peers and median(peers) < SLOW * own:
            found.append(Straggler(rank, nodes[rank], own, median(peers)))
    return found


class StragglerWatch:
    """Adds up each rank's own seconds, and compares them at the end of each window.

    Args:
        window_steps: 0 compares nothing.
    """

    def __init__(self, window_steps: int, device: torch.device) -> None:
        self.window_steps = window_steps
        self._device = device
        self._steps, self._seconds = 0, 0.0
        self._nodes: list[str] = []
        self._places: list[tuple[int, int]] = []

    def note(self, own_seconds: float) -> list[Straggler]:
        """Count a step; at the end of a window the slow ranks, which are the same on every rank."""
        self._steps += 1
        self._seconds += own_seconds
        if self.window_steps == 0 or self._steps < self.window_steps:
            return []
        if not self._nodes:
            self._ask_places()
        means = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=self._device)
        means[dist.get_rank()] = self._seconds / self._steps
        dist.all_reduce(means)
        self._steps, self._seconds = 0, 0.0
        return find_stragglers(means.tolist(), self._nodes, self._places)

    def _ask_places(self) -> None:
        mine = (
            node_name(),
            (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()),
        )
        everyone: list[tuple[str, tuple[int, int]]] = [("", (0, 0))] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self._nodes = [node for node, _ in everyone]
        self._places = [place for _, place in everyone]


def as_metric(stragglers: Sequence[Straggler]) -> Mapping[str, Any]:
    """The field of metrics.jsonl; nothing where no rank is slow."""
    return {"stragglers": [asdict(straggler) for straggler in stragglers]} if stragglers else {}
