"""What a run starts with: its last checkpoint, the weights of another run, Hugging Face folders, or new weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.checkpoint.save_load import Identity, Progress
from megatron_nvlm.config.load import load_run
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.hf.load_weights import load_folder_weights
from megatron_nvlm.hf.open_folders import FolderWeights
from megatron_nvlm.models.config import resolve_model
from megatron_nvlm.models.initialise import ADAPTERS, component_of
from megatron_nvlm.runs.changes import (
    COMPONENT_LR,
    LORA_RANK,
    describe_effect,
    differences,
    order_changes,
    refuse_changes,
    refuse_other_order,
    settings_of,
)
from megatron_nvlm.runs.components import open_weights
from megatron_nvlm.runs.entry import say
from megatron_nvlm.runs.resolve import ResolvedRun
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.loop import Trainer


@dataclass(frozen=True)
class Start:
    """The first of these that is there; new weights if none is."""

    checkpoint: Path | None
    """Of this run."""
    initial: Path | None
    """Of another run, whose weights a new one starts with."""
    folders: FolderWeights | None
    """Hugging Face folders whose weights a new run starts with."""
    keep_schedule: bool
    """Whether the checkpoint's schedule goes on, whatever the run file says."""
    new_order: bool
    """Whether the order of samples is another one than the checkpoint's, and begins at its first sample."""
    new_components: tuple[str, ...] = ()
    """Components that the initial weights lack and that are new: adapters."""

    def loads(self, name: str) -> bool:
        """Whether a weight of that name comes from here."""
        whole = self.checkpoint is not None or self.initial is not None
        return (whole and component_of(name) not in self.new_components) or (
            self.folders is not None and name in self.folders.rows
        )


def find_start(run: ResolvedRun, identity: Identity) -> Start:
    """Look for what the run starts with, and refuse what is of another model; every rank calls it.

    Raises:
        UserError: checkpoint or folder is damaged, missing, or of another model.
    """
    settings = run.config.checkpoint
    checkpoint = save_load.checkpoint_to_resume(run.run_dir, settings.verify)
    initial, folders = None, None
    if checkpoint is None:
        if settings.initial_weights is not None:
            initial = save_load.find_checkpoint(Path(settings.initial_weights), settings.verify)
        folders = open_weights(run.model)
    new_order = False
    new_components: tuple[str, ...] = ()
    path = checkpoint or initial  # initial weights are looked for only where there is no checkpoint
    if path is not None:
        save_load.check_identity(path, identity)
        save_load.check_core(path)  # a load does so too, but only once the model is built
        changed = changed_settings(path, identity)
        if checkpoint is None and changed.get(LORA_RANK, (None, None))[0] == 0:
            new_components = (ADAPTERS,)
            del changed[LORA_RANK]
        refuse_changes(path, changed, settings.allow_changes, goes_on=checkpoint is not None)
        if checkpoint is not None:
            new_order = _begins_new_order(checkpoint, identity, settings.allow_changes)
            say_changes(changed, settings.keep_schedule)
    return Start(checkpoint, initial, folders, settings.keep_schedule, new_order, new_components)


def keep_multiples(start: Start, run: ResolvedRun) -> ResolvedRun:
    """The run with the checkpoint's multiples of learning rates by component, where its schedule is kept."""
    if start.checkpoint is None or not start.keep_schedule:
        return run
    stored = save_load.read_identity(start.checkpoint).settings.get(COMPONENT_LR, {})
    optimizer = replace(run.config.optimizer, component_lr=dict(stored))
    return replace(run, config=replace(run.config, optimizer=optimizer))


def changed_settings(checkpoint: Path, identity: Identity) -> dict[str, tuple[Any, Any]]:
    """By key, the checkpoint's value and this run's.

    A checkpoint of an earlier version does not say its settings; the config.yaml of its run does, if that is there.
    """
    before = save_load.read_identity(checkpoint).settings
    file = RunDir(checkpoint.parent.parent).config
    if not before and file.is_file():
        config = load_run(file)
        before = settings_of(config, resolve_model(config.model))
    return differences(before, identity.settings)


def _begins_new_order(checkpoint: Path, identity: Identity, allowed: Sequence[str]) -> bool:
    keys = order_changes(save_load.read_identity(checkpoint).data, identity.data)
    refuse_other_order(checkpoint, keys, allowed)
    if keys:
        say(f"another order of samples by {', '.join(keys)} (allowed); it is read from its first sample on")
    return bool(keys)


def say_changes(changed: Mapping[str, tuple[Any, Any]], keep_schedule: bool) -> None:
    """List what the run file changes in a run that goes on."""
    for key, (old, new) in changed.items():
        effect = describe_effect(key, keep_schedule)
        say(f"changed since the checkpoint: {key}: {json.dumps(old)} -> {json.dumps(new)}{effect}")


def load_start(start: Start, trainer: Trainer) -> Progress:
    """Put it into the trainer, and return how far the run is; every rank calls it."""
    if start.checkpoint is not None:
        progress = save_load.load(
            start.checkpoint, trainer.bare_model, trainer.optimizer, trainer.scheduler, start.keep_schedule
        )
        say(f"resuming from step {progress.step} ({start.checkpoint})")
        return Progress(progress.step, DataPosition()) if start.new_order else progress
    if start.initial is not None:
        save_load.load_model(start.initial, trainer.bare_model, start.new_components)
        new = f"; new: {', '.join(start.new_components)}" if start.new_components else ""
        say(f"starting with the weights of {start.initial}{new}")
    elif start.folders is not None:
        load_folder_weights(trainer.bare_model, start.folders)
        say("starting with the weights of the Hugging Face folders that model names; what they lack is new")
    if start.initial is not None or start.folders is not None:
        trainer.optimizer.reload_model_params()
    return Progress(0, DataPosition())
