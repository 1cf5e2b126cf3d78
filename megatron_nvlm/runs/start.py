"""What a run starts with: its last checkpoint, the weights of another run, Hugging Face folders, or new weights."""

from dataclasses import dataclass
from pathlib import Path

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.checkpoint.save_load import Identity, Progress
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.hf.load_weights import load_folder_weights
from megatron_nvlm.hf.open_folders import FolderWeights
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
    return Start(checkpoint, initial, folders)


def load_start(start: Start, trainer: Trainer) -> Progress:
    """Put it into the trainer, and return how far the run is; every rank calls it."""
    if start.checkpoint is not None:
        progress = save_load.load(start.checkpoint, trainer.bare_model, trainer.optimizer, trainer.scheduler)
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
