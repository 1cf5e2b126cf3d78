"""A trained run opened for questions: its configuration, pipeline and weights, under any tensor and pipeline layout."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.config.load import load_run
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.data.prepare import SamplePipeline
from megatron_nvlm.errors import UserError
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.parallel.groups import world_size_from_environment
from megatron_nvlm.runs.changes import refuse_changes
from megatron_nvlm.runs.components import load_tokenizer, make_identity, make_model, make_pipeline
from megatron_nvlm.runs.processes import start
from megatron_nvlm.runs.resolve import resolve_run
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.runs.start import changed_settings

# Before the user's overrides: the depth in one stage, however it was trained.
WHOLE_DEPTH = (
    "parallelism.pipeline_model_parallel_size=1",
    "parallelism.virtual_pipeline_model_parallel_size=1",
    "parallelism.pipeline_layout=null",
)


@dataclass(frozen=True)
class TrainedRun:
    """What answers questions."""

    run: RunConfig
    pipeline: SamplePipeline
    model: NVLMModel
    progress: save_load.Progress
    checkpoint: Path
    """Folder of the checkpoint whose weights it has."""


def open_trained_run(run_dir: Path, checkpoint: Path | None = None, overrides: Sequence[str] = ()) -> TrainedRun:
    """Open the run of a folder at its newest checkpoint, or at a named one.

    A checkpoint loads under any layout: pipeline stages of the training are joined, unless overrides ask for some.

    Raises:
        UserError: no run or checkpoint is there, or the layout does not fit.
    """
    config_file = RunDir(run_dir).config
    if not config_file.is_file():
        raise UserError(f"{run_dir} is no run: it holds no config.yaml; name the run_dir of a training")
    run = load_run(config_file, [*WHOLE_DEPTH, *overrides])
    if run.parallelism.virtual_pipeline_model_parallel_size > 1:
        raise UserError(
            "parallelism.virtual_pipeline_model_parallel_size is for training; leave it out, "
            "and set pipeline_model_parallel_size alone for stages that answer"
        )
    # The batch is of no interest here, and ranks may be fewer than in training.
    world_size = world_size_from_environment()
    training = dataclasses.replace(run.training, micro_batch_size=1, global_batch_size=world_size)
    run = dataclasses.replace(run, training=training)
    resolved = resolve_run(run, world_size)
    tokenizer = load_tokenizer(resolved)
    path = save_load.find_checkpoint(checkpoint or run_dir)
    identity = make_identity(run, resolved.model, tokenizer)
    save_load.check_identity(path, identity)
    refuse_changes(path, changed_settings(path, identity), run.checkpoint.allow_changes)
    device = start(resolved)
    model = make_model(resolved.model, run.parallelism, resolved.precision, device.torch_device).eval()
    progress = save_load.load_model(path, model)
    return TrainedRun(run, make_pipeline(resolved, tokenizer), model, progress, path)
