"""Ranks compared with each other: matrix products, messages inside and between nodes, clocks."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from megatron_nvlm.doctor.findings import Finding, bad, good, note
from megatron_nvlm.doctor.storage import LARGEST_SKEW_SECONDS
from megatron_nvlm.parallel.device import wait_for

SLOW = 0.7
"""Part of the median below which a rank or a node is slow (our choice; the stragglers of training have the same)."""
_MESSAGE_BYTES = {"cuda": 2**28, "cpu": 2**22}
_TIMES = 5


@dataclass(frozen=True)
class Measured:
    """What a rank measured."""

    node: str
    local_rank: int
    tflops: float
    inside: float
    """GB/s of an all-reduce within its node; 0 where it is alone there."""
    between: tuple[float, ...]
    """GB/s of all-reduces of this node with each neighbour; of the first rank of a node only."""
    clock: float
    """Seconds, just after all ranks have met."""


def measure(node: str, local_rank: int, tflops: float, device: torch.device) -> list[Measured]:
    """Every rank calls it; returns what all of them measured, by rank."""
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, node)
    inside, between = 0.0, []
    for name in dict.fromkeys(nodes):
        ranks = [rank for rank, other in enumerate(nodes) if other == name]
        speed = _all_reduce(ranks, device)
        inside = speed if name == node else inside
    first = [nodes.index(name) for name in dict.fromkeys(nodes)]
    for one, other in zip(first, first[1:], strict=False):
        speed = _all_reduce([one, other], device)
        if dist.get_rank() in (one, other):
            between.append(speed)
    dist.barrier()
    own = Measured(node, local_rank, tflops, inside, tuple(between), time.time())
    everyone: list[Measured] = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def _all_reduce(ranks: Sequence[int], device: torch.device) -> float:
    """GB/s of a message among some ranks (bytes of the message over seconds); 0 on others and where there is one."""
    group = dist.new_group(list(ranks))
    if len(ranks) < 2 or dist.get_rank() not in ranks:
        return 0.0
    message = torch.zeros(_MESSAGE_BYTES[device.type] // 4, device=device)

    def send() -> float:
        began = time.perf_counter()
        for _ in range(_TIMES):
            dist.all_reduce(message, group=group)
        wait_for(device)
        return time.perf_counter() - began

    send()  # the first one connects
    return _MESSAGE_BYTES[device.type] * _TIMES / send() / 1e9


def compare(measured: Sequence[Measured]) -> Iterator[tuple[str, Finding]]:
    """Findings with the node that each is about; an empty name stands for all."""
    yield from _compare_products(measured)
    yield from _compare_inside(measured)
    yield from _compare_between(measured)
    clocks = [one.clock for one in measured]
    usual = median(clocks)
    apart = [one for one in measured if abs(one.clock - usual) > LARGEST_SKEW_SECONDS]
    for one in _first_of_nodes(apart):
        skew = f"the clock of {one.node} is {one.clock - usual:+.0f} s off the others'"
        yield one.node, bad("clock", f"{skew}; set it (chrony or ntpd)", of_node=True)
    if not apart:
        yield "", good("clock", f"all ranks agree within {max(clocks) - min(clocks):.2f} s")


def _compare_products(measured: Sequence[Measured]) -> Iterator[tuple[str, Finding]]:
    usual = median(one.tflops for one in measured)
    slow = [one for one in measured if one.tflops < SLOW * usual]
    for one in slow:
        sentence = f"GPU {one.local_rank} of {one.node}: {one.tflops:.3g} TFLOP/s, others {usual:.3g}"
        yield one.node, bad("products", f"{sentence}; have its clocks and cooling looked at", of_node=True)
    if not slow:
        yield "", good("products", f"{usual:.3g} TFLOP/s (median), least {min(one.tflops for one in measured):.3g}")


def _compare_inside(measured: Sequence[Measured]) -> Iterator[tuple[str, Finding]]:
    speeds = {one.node: one.inside for one in measured if one.inside}
    if not speeds:
        return
    usual = median(speeds.values())
    slow = {node: speed for node, speed in speeds.items() if speed < SLOW * usual}
    for node, speed in slow.items():
        yield (
            node,
            bad(
                "inside nodes",
                f"{node}: {speed:.3g} GB/s, other nodes {usual:.3g}; have its NVLink looked at",
                of_node=True,
            ),
        )
    if not slow:
        yield "", good("inside nodes", f"all-reduce {usual:.3g} GB/s (median)")


def _compare_between(measured: Sequence[Measured]) -> Iterator[tuple[str, Finding]]:
    """A node is slow if its messages with every neighbour are."""
    nodes = _first_of_nodes(measured)
    speeds = [speed for one in nodes for speed in one.between]
    if not speeds:
        return
    usual = median(speeds)
    if len(nodes) < 4:
        yield "", note("between nodes", f"all-reduce {usual:.3g} GB/s; fewer than 4 nodes are not compared")
        return
    slow = [one for one in nodes if one.between and max(one.between) < SLOW * usual]
    for one in slow:
        sentence = f"{one.node}: at most {max(one.between):.3g} GB/s with its neighbours, others {usual:.3g}"
        yield one.node, bad("between nodes", f"{sentence}; have its network looked at", of_node=True)
    if not slow:
        yield "", good("between nodes", f"all-reduce {usual:.3g} GB/s (median), least {min(speeds):.3g}")


def _first_of_nodes(measured: Sequence[Measured]) -> list[Measured]:
    return list({one.node: one for one in reversed(measured)}.values())[::-1]
