"""What a run starts with: its last checkpoint, the weights of another run, Hugging Face folders, or new weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.checkpoint.save_load import Identity, Progress
from megatron_nvlm.config.load import load_run
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.hf.load_weights import load_folder_weights
from megatron_nvlm.hf.open_folders import FolderWeights
from megatron_nvlm.models.config import resolve_model
from megatron_nvlm.runs.changes import SCHEDULE_KEYS, differences, no_effect, settings_of
from megatron_nvlm.runs.components import open_weights
from megatron_nvlm.runs.entry import say
from megatron_nvlm.runs.resolve import ResolvedRun
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
    for path in (checkpoint, initial):
        if path is not None:
            save_load.check_identity(path, identity)
            save_load.check_core(path)  # a load does so too, but only once the model is built
    if checkpoint is not None:
        say_changes(_settings_before(checkpoint, run), identity.settings, settings.keep_schedule)
    return Start(checkpoint, initial, folders, settings.keep_schedule)


def _settings_before(checkpoint: Path, run: ResolvedRun) -> Mapping[str, Any]:
    """Of the checkpoint or, for one of an earlier version, of the config.yaml beside it; nothing if neither says."""
    settings = save_load.read_identity(checkpoint).settings
    if settings or not run.run_dir.config.is_file():
        return settings
    before = load_run(run.run_dir.config)
    return settings_of(before, resolve_model(before.model))


def say_changes(before: Mapping[str, Any], now: Mapping[str, Any], keep_schedule: bool) -> None:
    """List what the run file changes in a run that goes on."""
    for key, (old, new) in differences(before, now).items():
        kept = keep_schedule and key in SCHEDULE_KEYS
        effect = " (kept at the old value by checkpoint.keep_schedule)" if kept else no_effect(key)
        say(f"changed since the checkpoint: {key}: {json.dumps(old)} -> {json.dumps(new)}{effect}")


def load_start(start: Start, trainer: Trainer) -> Progress:
    """Put it into the trainer, and return how far the run is; every rank calls it."""
    if start.checkpoint is not None:
        progress = save_load.load(
            start.checkpoint, trainer.bare_model, trainer.optimizer, trainer.scheduler, start.keep_schedule
        )
        say(f"resuming from step {progress.step} ({start.checkpoint})")
        return progress
    if start.initial is not None:
        save_load.load_model(start.initial, trainer.bare_model)
        say(f"starting with the weights of {start.initial}")
    elif start.folders is not None:
        load_folder_weights(trainer.bare_model, start.folders)
        say("starting with the weights of the Hugging Face folders that model names; what they lack is new")
    if start.initial is not None or start.folders is not None:
        trainer.optimizer.reload_model_params()
    return Progress(0, DataPosition())
