"""Entry point of training: `torchrun --nproc-per-node N -m megatron_nvlm.train --config FILE.yaml [key=value ...]`."""

import argparse
import sys
from pathlib import Path

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.config.load import dump_run, load_run
from megatron_nvlm.config.rules import check_files, check_run
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.core_compat import keep_checkpoint_process
from megatron_nvlm.hf.load_weights import load_folder_weights
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import start_groups, stop_groups, world_size_from_environment
from megatron_nvlm.runs import trainer as setup
from megatron_nvlm.runs.components import make_identity, open_data, open_weights
from megatron_nvlm.runs.entry import global_rank, say, user_errors_end_the_process
from megatron_nvlm.training.faults import FINISHED_FILE, StopRequest, lock_run, stop_with_launcher
from megatron_nvlm.training.loop import train
from megatron_nvlm.training.metrics import MetricsWriter
from megatron_nvlm.training.sample_files import SampleWriter


def run_training(run: RunConfig) -> None:
    """Train a run from where it stands: from its last checkpoint if there is one."""
    stop_with_launcher()
    run_dir = Path(run.run_dir)
    check_run(run, world_size_from_environment())
    check_files(run)
    parts = open_data(run.data, run.tiling, run.model)
    identity = make_identity(run.model, parts.pipeline.tokenizer)
    # Ranks meet behind this line, so the others wait until rank 0 has the directory, and read `latest` after that.
    lock = lock_run(run_dir) if global_rank() == 0 else None
    device = use_device()
    start_groups(run.parallelism, device, run.training.seed, run.training.timeout_seconds)
    checkpoint = save_load.checkpoint_to_resume(run_dir, run.checkpoint.verify)
    initial = _initial_weights(run) if checkpoint is None else None
    folders = open_weights(run.model) if checkpoint is None else None
    for path in (checkpoint, initial):
        if path is not None:
            save_load.check_identity(path, identity)

    setup.prepare_run_dir(run_dir, dump_run(run))
    keep_checkpoint_process()
    stop = StopRequest(run_dir)
    trainer = setup.make_trainer(
        run.model,
        run.parallelism,
        run.recipe,
        run.optimizer,
        run.training,
        run.data,
        parts,
        run.checkpoint.save_every_steps,
        device,
    )
    start = save_load.Progress(step=0, consumed_samples=0)
    state = (trainer.bare_model, trainer.optimizer, trainer.scheduler)
    if checkpoint is not None:
        start = save_load.load(checkpoint, *state)
        say(f"going on from step {start.step} ({checkpoint})")
    elif initial is not None:
        save_load.load_model(initial, trainer.bare_model)
        trainer.optimizer.reload_model_params()
        say(f"starting with the weights of {initial}")
    elif folders is not None:
        load_folder_weights(trainer.bare_model, folders)
        trainer.optimizer.reload_model_params()
        say("starting with the weights of the Hugging Face folders that model names; what they lack is new")
    writer = MetricsWriter(run_dir, run.logging, start.step, run.training.train_steps)
    samples = SampleWriter(run_dir, start.step, run.data.ledger)

    saver = CheckpointSaver(run_dir, run.checkpoint, identity, *state)
    outcome = train(trainer, start, writer, samples, stop, saver)
    writer.close()
    samples.close()
    trainer.loader.close()
    if outcome.finished:
        if global_rank() == 0:
            (run_dir / FINISHED_FILE).write_text(f"{outcome.progress.step}\n")
        say(f"finished after step {outcome.progress.step}; everything is in {run_dir}")
    else:
        say(f"stopped after step {outcome.progress.step}, saved; the same command goes on from there")
    stop_groups()
    if lock is not None:
        lock.close()


def _initial_weights(run: RunConfig) -> Path | None:
    path = run.checkpoint.initial_weights
    return None if path is None else save_load.find_checkpoint(Path(path), run.checkpoint.verify)


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="megatron_nvlm.train", description="Train NVLM-D, NVLM-X or NVLM-H.")
    parser.add_argument("--config", required=True, help="run file, see configs/")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    run_training(load_run(options.config, options.overrides))


if __name__ == "__main__":
    sys.exit(main())
