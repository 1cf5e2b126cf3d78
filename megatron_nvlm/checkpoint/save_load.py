"""Checkpoints: Megatron-core's `torch_dist` format, which loads under any layout; complete or not there at all.

A run's `checkpoints/` holds `step_00000100/` and so on, and `latest`, the name of the newest complete one. A checkpoint
is written under another name and renamed when every rank is done (async_save.py).
"""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_nvlm.checkpoint.census import refuse_unused_weights
from megatron_nvlm.checkpoint.integrity import IDENTITY_FILE, find_damage
from megatron_nvlm.checkpoint.parameter_groups import OwnGroups
from megatron_nvlm.checkpoint.retention import LATEST_FILE, candidates, read_latest
from megatron_nvlm.core_compat import core_version, is_newer_than_core, minor_release
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.errors import UserError
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.models.initialise import component_of
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.runs.run_dir import RunDir

METADATA_FILE = "metadata.json"
"""Of core."""
COMMON_FILE = "common.pt"
"""What is no tensor; older cores read nothing without it, newer ones (0.19) write none and read both."""
_WSD_KEYS = ("wsd_decay_steps", "lr_wsd_decay_style")
"""Of core's schedule, which it does not save itself."""
_CONSTANTS = ("betas", "eps")
"""Of every parameter group alike; rates and weight decay follow from the schedule."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointConfig:
    """Section `checkpoint` of a run."""

    save_every_steps: int = 500
    keep_last: int = 2
    """Complete checkpoints that stay; older ones are removed."""
    keep_every_steps: int | None = None
    """Checkpoints of every N-th step are never removed; null for none."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    verify: str = "size"
    """What is checked of a checkpoint before it is loaded: size of its files, or checksum, which reads them all."""
    initial_weights: str | None = None
    """Run folder or checkpoint whose weights a new run starts with (SFT after pretraining); null for random weights."""
    keep_schedule: bool = False
    """Go on with the checkpoint's learning rates, weight decay, Adam constants and schedule, not the file's."""
    allow_changes: list[str] = field(default_factory=list)
    """Keys that may differ from the checkpoint's though its weights or its order of samples rest on them."""


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int
    position: DataPosition
    """Where its data goes on."""

    def to_plain(self) -> dict[str, int]:
        """The value as a checkpoint stores it."""
        return {"step": self.step, **vars(self.position)}

    @classmethod
    def from_plain(cls, stored: Mapping[str, int]) -> "Progress":
        """Read what `to_plain` wrote."""
        position = {name: value for name, value in stored.items() if name != "step"}
        return cls(stored["step"], DataPosition(**position))


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is of; loading into anything else is refused."""

    variant: str
    language: str
    vision: str
    tokenizer: str
    """Fingerprint."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Every key of the run in force, as `settings_of` (runs/changes.py) gives them; checkpoints of before have none."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What decides the order of samples, as `data_fingerprint` gives it; checkpoints without a run's data have none."""


def checkpoint_to_resume(run_dir: RunDir, verify: str) -> Path | None:
    """The newest checkpoint of a run that is whole, if the run has any; every rank calls it, and all get the same.

    One that is damaged is passed over with a warning, for the one before it.

    Raises:
        UserError: there are checkpoints and none is whole.
    """
    found = [candidates(run_dir.checkpoints)]
    dist.broadcast_object_list(found, src=0)
    damages: list[str] = []
    for path in found[0]:
        damage = _find_damage_together(path, verify)
        if not damage:
            if damages and dist.get_rank() == 0:
                print(f"warning: the newest checkpoint is damaged ({'; '.join(damages)}); using {path}", flush=True)
            return path
        damages.append(f"{path}: {damage}")
    if damages:
        raise UserError(
            f"no checkpoint of {run_dir.path} is whole ({'; '.join(damages)}); restore one of them, or remove "
            f"{run_dir.checkpoints} to begin again"
        )
    return None


def _find_damage_together(path: Path, verify: str) -> str:
    """The ranks share the files and all get the same answer; without process groups, each looks at all of them."""
    if not dist.is_initialized():
        return find_damage(path, verify)
    shares: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(shares, find_damage(path, verify, (dist.get_rank(), dist.get_world_size())))
    return next(filter(None, shares), "")


def find_checkpoint(path: Path, verify: str = "size") -> Path:
    """A whole checkpoint by its own folder or by its run's; every rank calls it.

    Raises:
        UserError: there is none, or it is damaged.
    """
    found: Path | None = path
    if not (path / IDENTITY_FILE).is_file() and not (path / METADATA_FILE).is_file():
        found = read_latest(RunDir(path).checkpoints)
    if found is None:
        raise UserError(f"there is no checkpoint in {path}; name a run folder or a folder below its checkpoints/")
    if damage := _find_damage_together(found, verify):
        raise UserError(f"the checkpoint {found} is damaged ({damage}); restore it or name another one")
    return found


def write_identity(path: Path, identity: Identity, progress: Progress) -> None:
    """Say in a checkpoint's folder what it is of, how far it is, and which Megatron-core wrote it."""
    says = {"model": vars(identity), "progress": progress.to_plain(), "core": core_version()}
    (path / IDENTITY_FILE).write_text(json.dumps(says))


def read_identity(path: Path) -> Identity:
    """What the checkpoint is of; UserError if the folder is no checkpoint of ours."""
    try:
        return Identity(**json.loads((path / IDENTITY_FILE).read_text())["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no checkpoint of megatron_nvlm ({error})") from error


def check_identity(path: Path, identity: Identity) -> None:
    """Refuse a checkpoint of another model, naming the first difference."""
    found = read_identity(path)
    for name, what in (("variant", "NVLM"), ("language", "language model"), ("vision", "vision model")):
        theirs, ours = getattr(found, name), getattr(identity, name)
        if theirs != ours:
            raise UserError(
                f"the checkpoint {path} is of {what} {theirs!r} and this run is of {ours!r}; "
                f"set model.{name}={theirs} or choose another run_dir"
            )
    if found.tokenizer and found.tokenizer != identity.tokenizer:  # weights may have come without one
        raise UserError(
            f"the checkpoint {path} was trained with another tokenizer than data.tokenizer names; "
            "use the one it was trained with"
        )


def check_core(path: Path) -> None:
    """Refuse a checkpoint that a newer Megatron-core wrote in a form of its own; one that does not say by which, passes."""
    if (path / COMMON_FILE).is_file() or not (path / IDENTITY_FILE).is_file():
        return
    writer = json.loads((path / IDENTITY_FILE).read_text()).get("core")
    if writer is not None and is_newer_than_core(writer):
        least = ".".join(map(str, minor_release(writer)))
        raise UserError(
            f"the checkpoint {path} was written by Megatron-core {writer} in a form that {core_version()} cannot read; "
            f"install megatron-core>={least} (it wants Python 3.12 or later), or take over the weights alone: "
            "nvlm-convert-checkpoint export reads them with any core"
        )


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def state_to_save(
    progress: Progress, model: NVLMModel | ModelChunks, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> dict[str, Any]:
    """What `dist_checkpointing.save` gets; every rank calls it."""
    model_state = model.sharded_state_dict(metadata=_metadata())
    schedule = {**scheduler.state_dict(), **{key: getattr(scheduler, key) for key in _WSD_KEYS}}
    state = {"model": model_state, "scheduler": schedule, "progress": progress.to_plain()}
    if _has_parameters(optimizer):
        state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=False, metadata=_metadata())
    return state


def _has_parameters(optimizer: MegatronOptimizer) -> bool:
    """Whether anything trains on this rank; a later pipeline stage may be frozen as a whole, and core cannot save that."""
    return any(group["params"] for group in optimizer.param_groups)


def first_line(error: BaseException) -> str:
    """An error of core, within a sentence; of what several writers met, the first."""
    for rank, (cause, _) in getattr(error, "failures", {}).items():
        return f"writer of rank {rank}: {first_line(cause)}"
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]


def load_model(path: Path, model: NVLMModel | ModelChunks, new_components: Collection[str] = ()) -> Progress:
    """Weights alone, into any layout.

    Args:
        new_components: what the checkpoint lacks; it stays as it is.
    """
    state = {"model": _without(model.sharded_state_dict(metadata=_metadata()), new_components)}
    loaded = _load(state, path)
    model.load_state_dict(loaded["model"], strict=not new_components)
    return Progress.from_plain(loaded["progress"])


def _without(state: dict[str, Any], components: Collection[str]) -> dict[str, Any]:
    """A model's state, in chunks or not, without the weights of some components."""
    return {
        name: _without(entry, components) if isinstance(entry, dict) else entry
        for name, entry in state.items()
        if component_of(name) not in components
    }


def load(
    path: Path,
    model: NVLMModel | ModelChunks,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    keep_schedule: bool = False,
) -> Progress:
    """Model, optimizer, step of the schedule and position, into any layout.

    Args:
        optimizer: its groups of parameters may be others than the checkpoint's.
        keep_schedule: take the checkpoint's schedule and constants of Adam too, instead of those that were built.
    """
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
        own_groups = OwnGroups(optimizer, state["optimizer"])
    loaded = _load(state, path)
    model.load_state_dict(loaded["model"])
    if trains:
        constants = own_groups.put_into(loaded["optimizer"])
        optimizer.load_state_dict(loaded["optimizer"])
        if keep_schedule:
            for group in optimizer.param_groups:
                group.update({key: constants[key] for key in _CONSTANTS})
    if keep_schedule:
        for group in optimizer.param_groups:
            group.update({key: group["lr_mult"] * loaded["scheduler"][key] for key in ("max_lr", "min_lr")})
        scheduler.num_steps = 0  # core adds the stored steps to those that the new schedule has already made
        for key in _WSD_KEYS:
            setattr(scheduler, key, loaded["scheduler"].get(key))
        scheduler.load_state_dict(loaded["scheduler"])
    else:
        scheduler.num_steps = loaded["scheduler"]["num_steps"]
    scheduler.step(increment=0)  # core itself would apply a weight decay of before to the first update
    return Progress.from_plain(loaded["progress"])


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    check_core(path)
    refuse_unused_weights(path, state["model"])
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(path))
        return loaded
    except (Exception, CheckpointException) as error:  # core raises many types for a damaged folder
        raise UserError(
            f"the checkpoint {path} cannot be loaded ({first_line(error)}); if it is damaged, write the name of another "
            f"one into {path.parent / LATEST_FILE}; checkpoint.verify=checksum finds and passes over damaged ones"
        ) from error
