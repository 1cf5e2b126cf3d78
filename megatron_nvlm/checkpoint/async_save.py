"""Asynchronous saves: training blocks only while state is copied; a child process per rank writes.

Core plans the save and copies tensors of a GPU, and parts of larger buffers, to memory of the host; the writer is forked
from the rank, so it has all else as it was (the kernel copies what training changes meanwhile). At most one save is in
flight.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_nvlm.checkpoint.integrity import find_damage, write_manifest, write_sums_of_rank
from megatron_nvlm.checkpoint.retention import (
    candidates,
    remove_checkpoint,
    remove_old,
    step_folder,
    sync_folder,
    write_latest,
)
from megatron_nvlm.checkpoint.save_load import (
    CheckpointConfig,
    Identity,
    Progress,
    first_line,
    state_to_save,
    write_identity,
)
from megatron_nvlm.checkpoint.soundness import refuse_unsound
from megatron_nvlm.core_compat import deaf_and_not_alone, own_checkpoint_writer
from megatron_nvlm.errors import UserError
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.runs.run_dir import RunDir


@dataclass(frozen=True)
class _Flight:
    """The save that is being written."""

    progress: Progress
    partial: Path
    final: Path


class CheckpointSaver:
    """Writes the checkpoints of a run; every rank calls every method, at the same points of the run.

    Every method raises UserError on every rank if any of them could not write; earlier checkpoints are as they were.
    """

    def __init__(
        self,
        run_dir: RunDir,
        config: CheckpointConfig,
        identity: Identity,
        model: NVLMModel | ModelChunks,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
    ) -> None:
        self.config = config
        self._folder = run_dir.checkpoints
        self._identity = identity
        self._state = (model, optimizer, scheduler)
        self._calls = AsyncCallsQueue()
        self._flight: _Flight | None = None
        self._waited = 0.0

    def save(self, progress: Progress, wait: bool = False) -> None:
        """Begin a checkpoint, after the one in flight; with `wait`, or without `checkpoint.asynchronous`, end it too.

        Raises:
            UserError: it could not be written, or weights or optimizer hold values that are not finite.
        """
        began = time.monotonic()
        try:
            self._finish()
            model, optimizer, _ = self._state
            refuse_unsound(progress.step, model, optimizer, self.way_back)
            self._begin(progress)
            if wait or not self.config.asynchronous:
                self._finish()
        finally:
            self._waited += time.monotonic() - began

    @property
    def way_back(self) -> str:
        """What a run that has diverged can go on from, and how; call it with no save in flight."""
        newest = next(iter(candidates(self._folder)), None)
        lower = "lower optimizer.max_lr or optimizer.clip_grad"
        if newest is None:
            return f"the run has no checkpoint yet: {lower}, and start again"
        return (
            f"the newest sound checkpoint is {newest}, from which the same command goes on; unchanged, the run would meet "
            f"the same again, so {lower} first"
        )

    @property
    def in_flight(self) -> bool:
        """Whether a save has begun and not ended; the same on every rank."""
        return self._flight is not None

    def poll(self) -> None:
        """End the save in flight if all ranks' writers are done; at once if none is."""
        if self._flight is None:
            return
        began = time.monotonic()
        try:
            self._finish(blocking=False)
        finally:
            self._waited += time.monotonic() - began

    def finish(self) -> None:
        """Wait for the save in flight, if there is one."""
        self._finish()

    def take_waited(self) -> float:
        """Seconds that training waited for saves since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _begin(self, progress: Progress) -> None:
        final = self._folder / step_folder(progress.step)
        flight = _Flight(progress, self._folder / f".{final.name}.partial", final)
        self._on_first_rank(flight, bind(_make_anew, flight.partial))
        # Ranks agree before core's own collectives begin: a rank that failed alone would call other collectives.
        state: dict[str, Any] = {}
        error = ""
        try:
            state = state_to_save(progress, *self._state)
        except Exception as cause:  # core raises many types
            error = first_line(cause)
        _agree(error, flight)
        try:
            where = str(flight.partial)
            request: Any = dist_checkpointing.save(state, where, async_sharded_save=True, **own_checkpoint_writer())
            if request.async_fn is not None:  # None on a rank that has nothing to write
                writer = bind(_write_alone, request.async_fn, flight.partial, dist.get_rank())
                request = request._replace(async_fn=writer)
            self._calls.schedule_async_request(request)
        except (Exception, CheckpointException) as cause:  # the latter is no Exception
            error = first_line(cause)
        _agree(error, flight)
        self._flight = flight

    def _finish(self, blocking: bool = True) -> None:
        flight = self._flight
        if flight is None:
            return
        error = ""
        try:
            if not self._calls.maybe_finalize_async_calls(blocking):
                return  # on every rank
        except (Exception, CheckpointException) as cause:  # what the writers met, on every rank
            error = first_line(cause)
        self._flight = None
        _agree(error, flight)
        self._on_first_rank(flight, bind(self._publish, flight))

    def _publish(self, flight: _Flight) -> None:
        """Make the files a checkpoint: what it is, its manifest, its name, `latest`, in this order."""
        write_identity(flight.partial, self._identity, flight.progress)
        write_manifest(flight.partial)
        for path in flight.partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(flight.partial)
        if flight.final.exists():
            remove_checkpoint(flight.final)
        os.replace(flight.partial, flight.final)
        write_latest(self._folder, flight.final.name)
        config = self.config
        remove_old(self._folder, config.keep_last, config.keep_every_steps, flight.final, _is_whole)

    @staticmethod
    def _on_first_rank(flight: _Flight, work: Callable[[], None]) -> None:
        error = ""
        if dist.get_rank() == 0:
            try:
                work()
            except (OSError, ValueError) as cause:  # the latter for sums that a writer could not finish
                error = str(cause)
        _agree(error, flight)


def _is_whole(checkpoint: Path) -> bool:
    return not find_damage(checkpoint, "size")


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_alone(write: Callable[..., None], folder: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """What the writer's process does: core's part, then the sums of the files."""
    deaf_and_not_alone()
    # Core forks further ones; left behind they would hold the lock of the run's folder, which they inherit.
    os.register_at_fork(after_in_child=deaf_and_not_alone)
    write(*args, **kwargs)
    write_sums_of_rank(folder, rank)


def _agree(error: str, flight: _Flight) -> None:
    """Raise on every rank what any rank met."""
    errors: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, message in enumerate(errors):
        if message:
            if dist.get_rank() == 0:
                shutil.rmtree(flight.partial, ignore_errors=True)
            raise UserError(
                f"the checkpoint {flight.final.name} in {flight.final.parent} could not be saved (rank {rank}: {message}); "
                "make room or fix the folder and start again: the run goes on from its last complete checkpoint"
            )
