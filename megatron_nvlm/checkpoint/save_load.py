"""Checkpoints: Megatron-core's `torch_dist` format, which loads under any layout; complete or not there at all.

A run's `checkpoints/` holds `step_00000100/` and so on, and `latest`, the name of the newest complete one. A checkpoint
is written under another name and renamed when every rank is done.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.models.nvlm_model import NVLMModel

logger = logging.getLogger(__name__)

LATEST_FILE = "latest"
IDENTITY_FILE = "nvlm.json"


@dataclass(frozen=True)
class CheckpointConfig:
    """Section `checkpoint` of a run."""

    save_every_steps: int = 500
    keep_last: int = 2
    """Complete checkpoints that stay; older ones are removed."""
    initial_weights: str | None = None
    """Run folder or checkpoint whose weights a new run starts with (SFT after pretraining); null for random weights."""


@dataclass(frozen=True)
class Progress:
    """How far a run is; the whole position of its data."""

    step: int
    consumed_samples: int
    packs_taken: int = 0
    """With packing: rows that are done of the window that begins at `consumed_samples`."""


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is of; loading into anything else is refused."""

    variant: str
    language: str
    vision: str
    tokenizer: str
    """Fingerprint."""


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    name_file = run_dir / "checkpoints" / LATEST_FILE
    if not name_file.is_file():
        return None
    path = name_file.parent / name_file.read_text().strip()
    if not path.is_dir():
        raise UserError(f"{name_file} names {path.name}, which is not there; write the name of a checkpoint beside it")
    return path


def find_checkpoint(path: Path) -> Path:
    """A checkpoint by its own folder or by its run's; UserError if there is none."""
    if (path / IDENTITY_FILE).is_file():
        return path
    found = latest_checkpoint(path)
    if found is None:
        raise UserError(f"there is no checkpoint in {path}; name a run folder or a folder below its checkpoints/")
    return found


def read_identity(path: Path) -> Identity:
    """What the checkpoint is of; UserError if the folder is no checkpoint of ours."""
    try:
        return Identity(**json.loads((path / IDENTITY_FILE).read_text())["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no checkpoint of megatron_nvlm ({error})") from error


def check_identity(path: Path, identity: Identity) -> None:
    """Refuse a checkpoint of another model, naming the first difference."""
    found = read_identity(path)
    for field, what in (("variant", "NVLM"), ("language", "language model"), ("vision", "vision model")):
        theirs, ours = getattr(found, field), getattr(identity, field)
        if theirs != ours:
            raise UserError(
                f"the checkpoint {path} is of {what} {theirs!r} and this run is of {ours!r}; "
                f"set model.{field}={theirs} or choose another run_dir"
            )
    if found.tokenizer and found.tokenizer != identity.tokenizer:  # weights may have come without one
        raise UserError(
            f"the checkpoint {path} was trained with another tokenizer than data.tokenizer names; "
            "use the one it was trained with"
        )


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def save(
    run_dir: Path,
    config: CheckpointConfig,
    progress: Progress,
    identity: Identity,
    model: NVLMModel | ModelChunks,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> None:
    """Write a checkpoint; every rank calls it.

    Raises:
        UserError: on every rank, if any of them could not write; earlier checkpoints are as they were.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step_{progress.step:08d}"
    partial = folder / f".{final.name}.partial"
    first = dist.get_rank() == 0
    error = ""
    if first:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as cause:
            error = str(cause)
    _agree(error, partial)
    # Ranks agree before core's own collectives begin: whoever failed alone would answer them with something else.
    try:
        state = _state_to_save(progress, model, optimizer, scheduler)
    except Exception as cause:  # core raises many types
        error = _first_line(cause)
    _agree(error, partial)
    try:
        dist_checkpointing.save(state, str(partial))
    except (Exception, CheckpointException) as cause:  # what core's writers met; the latter is no Exception
        error = _first_line(cause)
    _agree(error, partial)
    if first:
        try:
            (partial / IDENTITY_FILE).write_text(json.dumps({"model": vars(identity), "progress": vars(progress)}))
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
            _write_latest(folder, final.name)
            _remove_old(folder, config.keep_last, final)
        except OSError as cause:
            error = str(cause)
    _agree(error, partial)


def _state_to_save(
    progress: Progress, model: NVLMModel | ModelChunks, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> dict[str, Any]:
    model_state = model.sharded_state_dict(metadata=_metadata())
    state = {"model": model_state, "scheduler": scheduler.state_dict(), "progress": vars(progress)}
    if _has_parameters(optimizer):
        state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=False, metadata=_metadata())
    return state


def _has_parameters(optimizer: MegatronOptimizer) -> bool:
    """Whether anything trains on this rank; a later pipeline stage may be frozen as a whole, and core cannot save that."""
    return any(group["params"] for group in optimizer.param_groups)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]


def _agree(error: str, partial: Path) -> None:
    """Raise on every rank what any rank met."""
    errors: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, message in enumerate(errors):
        if message:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"the checkpoint {partial.parent} could not be saved (rank {rank}: {message}); "
                "make room or mend the folder and start again: the run goes on from its last complete checkpoint"
            )


def _write_latest(folder: Path, name: str) -> None:
    partial = folder / f"{LATEST_FILE}.partial"
    partial.write_text(name)
    os.replace(partial, folder / LATEST_FILE)


def _remove_old(folder: Path, keep_last: int, newest: Path) -> None:
    complete = sorted(path for path in folder.glob("step_*") if path != newest)
    for path in complete[: max(0, len(complete) - (keep_last - 1))]:
        shutil.rmtree(path)
    for leftover in folder.glob(".step_*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def load_model(path: Path, model: NVLMModel | ModelChunks) -> Progress:
    """Weights alone, into any layout."""
    state = {"model": model.sharded_state_dict(metadata=_metadata())}
    loaded = _load(state, path)
    model.load_state_dict(loaded["model"])
    return Progress(**loaded["progress"])


def load(
    path: Path, model: NVLMModel | ModelChunks, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> Progress:
    """Model, optimizer, schedule and position, into any layout."""
    trains = _has_parameters(optimizer)
    for part in getattr(optimizer, "chained_optimizers", [optimizer] if trains else []):
        # Core's distributed optimizer can only receive state that is there; it makes none by itself before a first step.
        prepare = getattr(part, "_init_optimizer_states_with_dummy_values", None)
        if prepare is not None:
            prepare()
    model_state = model.sharded_state_dict(metadata=_metadata())
    state = {"model": model_state}
    if trains:
        state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=_metadata())
    loaded = _load(state, path)
    model.load_state_dict(loaded["model"])
    if trains:
        optimizer.load_state_dict(loaded["optimizer"])
    scheduler.num_steps = 0  # core adds the stored steps to those that the new schedule has already made
    scheduler.load_state_dict(loaded["scheduler"])
    return Progress(**loaded["progress"])


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(path))
        return loaded
    except (Exception, CheckpointException) as error:  # core raises many types for a damaged folder
        raise UserError(
            f"the checkpoint {path} cannot be loaded ({_first_line(error)}); if it is damaged, write the name of another "
            f"one into {path.parent / LATEST_FILE}"
        ) from error
