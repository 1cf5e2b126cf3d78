"""Process groups of a run: tensor, pipeline and data parallel. The only file that creates them."""

import datetime
import os
import socket

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import Device

AFTER_WATCHDOG_SECONDS = 30
"""How much later than the watchdog (training/watchdog.py) a collective gives up by itself, with a less helpful message."""

_alone: list[dist.ProcessGroup] = []
"""The group of this rank alone, once the groups are laid out."""


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def world_size_from_environment() -> int:
    """Ranks that the launcher announced; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_groups(parallelism: ParallelismConfig, device: Device, seed: int, timeout_seconds: float = 600) -> None:
    """Join the other ranks and lay out the groups. A process that no launcher started is a world of its own."""
    parallelism.data_parallel_size(world_size_from_environment())
    if not dist.is_initialized():
        if "WORLD_SIZE" not in os.environ:
            os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
        timeout = datetime.timedelta(seconds=timeout_seconds + AFTER_WATCHDOG_SECONDS)
        dist.init_process_group(device.communication, timeout=timeout)
    lay_out_groups(parallelism, timeout_seconds=timeout_seconds)
    model_parallel_cuda_manual_seed(seed)


def lay_out_groups(parallelism: ParallelismConfig, with_cpu_groups: bool = True, timeout_seconds: float = 600) -> None:
    """Divide the ranks of an initialised world into groups.

    Args:
        with_cpu_groups: also make the data-parallel groups over gloo that core's checkpoints use; a dry run, which has one
            process only, cannot.
        timeout_seconds: of the watchdog; collectives give up somewhat later.
    """
    chunks = parallelism.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallelism.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallelism.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        create_gloo_process_groups=with_cpu_groups,
        distributed_timeout_minutes=(timeout_seconds + AFTER_WATCHDOG_SECONDS) / 60,
    )
    # Only this rank joins its group, so the others need not be asked.
    _alone[:] = [dist.new_group([dist.get_rank()], use_local_synchronization=True)]


def stop_groups() -> None:
    """Leave the groups; safe to call twice."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        _alone.clear()
        dist.destroy_process_group()


def get_groups() -> ProcessGroupCollection:
    """This rank's groups."""
    return ProcessGroupCollection.use_mpu_process_groups()


def get_single_rank_groups() -> ProcessGroupCollection:
    """Groups that hold this rank alone, for modules that each rank keeps whole."""
    assert _alone, "lay_out_groups comes first"
    (alone,), everyone = _alone, get_groups()
    return ProcessGroupCollection(tp=alone, cp=alone, pp=alone, dp=everyone.dp, dp_cp=everyone.dp_cp)
