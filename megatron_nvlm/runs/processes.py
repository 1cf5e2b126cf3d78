"""This process as one rank of a run: the lock of the run directory, the device and the process groups."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_nvlm.config.load import dump_run
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.core_compat import keep_checkpoint_process
from megatron_nvlm.models.backends import check_backend_is_installed
from megatron_nvlm.parallel.device import Device, use_device
from megatron_nvlm.parallel.groups import start_groups, stop_groups
from megatron_nvlm.runs.entry import global_rank
from megatron_nvlm.runs.resolve import ResolvedRun
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.faults import lock_run


@contextmanager
def joined(run: ResolvedRun) -> Iterator[Device]:
    """Be a rank of the run, alone in its directory, until the block ends.

    After an error the process groups stay as they are: the process is about to end, and other ranks may not answer.
    """
    # Ranks meet in start_groups, so the others wait until rank 0 has the directory.
    lock = lock_run(run.run_dir) if global_rank() == 0 else None
    device = start(run)
    yield device
    stop_groups()
    if lock is not None:
        lock.close()


def start(run: ResolvedRun) -> Device:
    """Take this process's device and start the process groups of the run."""
    check_backend_is_installed(run.model.config.backend)
    training = run.config.training
    device = use_device(training.device)
    start_groups(run.config.parallelism, device, training.seed, max(training.limits.values()))
    return device


def prepare_run_dir(run_dir: RunDir, config: RunConfig) -> None:
    """Write the configuration in force and remove marks of earlier ends, once the start has succeeded; all ranks call it."""
    if dist.get_rank() == 0:
        run_dir.config.write_text(dump_run(config))
        run_dir.finished.unlink(missing_ok=True)
        run_dir.stopped.unlink(missing_ok=True)
    dist.barrier()
    keep_checkpoint_process()


def mark_end(run_dir: RunDir, step: int, finished: bool) -> None:
    """Say in the run directory how the run ended and after which step; a request to stop is then carried out."""
    if dist.get_rank() == 0:
        (run_dir.finished if finished else run_dir.stopped).write_text(f"{step}\n")
        run_dir.stop.unlink(missing_ok=True)
