"""Metrics of ranks that report different names become one number a name."""

import pytest
import torch
import torch.distributed as dist

from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import Device, use_device
from megatron_nvlm.parallel.groups import start_groups
from megatron_nvlm.training.metric import Metric, MetricReducer, Reduce
from tests.support.ranks import run_ranks


def merge_twice() -> list[dict[str, float]]:
    start_groups(ParallelismConfig(), use_device(), seed=1)
    rank = dist.get_rank()
    reducer = MetricReducer(torch.device("cpu"))
    found = []
    for step in (1, 2):
        metrics = [
            Metric("tokens", 10.0 * step + rank, Reduce.SUM),
            Metric("seconds", -1.0 - rank, Reduce.MAX),
            Metric(f"gate/{rank}", 0.5 + rank, Reduce.MEAN),
        ]
        if rank == 1:
            metrics.append(Metric("loss", 3.0, Reduce.SUM))
        found.append(reducer.merge(metrics))
    return found


def test_metrics_merge_by_name_over_ranks() -> None:
    first, second = run_ranks(2, merge_twice)
    assert first == second, "every rank has the totals"
    assert first[0] == {"gate/0": 0.5, "gate/1": 1.5, "loss": 3.0, "seconds": -1.0, "tokens": 21.0}
    assert first[1]["tokens"] == 41.0


def test_a_name_that_comes_later_is_refused(world_of_one: Device) -> None:
    reducer = MetricReducer(torch.device("cpu"))
    reducer.merge([Metric("tokens", 1.0, Reduce.SUM)])
    with pytest.raises(ValueError, match="the metric loss"):
        reducer.merge([Metric("loss", 1.0, Reduce.SUM)])
