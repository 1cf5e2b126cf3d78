"""Entry point of training: `torchrun --nproc-per-node N -m megatron_nvlm.train --config FILE.yaml [key=value ...]`."""

import argparse
import sys

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.config.load import load_run
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.parallel.groups import world_size_from_environment
from megatron_nvlm.runs.components import make_identity, open_data
from megatron_nvlm.runs.entry import global_rank, say, user_errors_end_the_process
from megatron_nvlm.runs.processes import joined, prepare_run_dir
from megatron_nvlm.runs.resolve import resolve_run
from megatron_nvlm.runs.start import find_start, load_start
from megatron_nvlm.runs.trainer import make_trainer
from megatron_nvlm.training.faults import StopRequest, stop_with_launcher
from megatron_nvlm.training.loop import Reports, train
from megatron_nvlm.training.metrics import MetricsWriter
from megatron_nvlm.training.sample_files import SampleWriter


def run_training(config: RunConfig) -> None:
    """Train a run from where it stands: from its last checkpoint if there is one."""
    stop_with_launcher()
    run = resolve_run(config, world_size_from_environment())
    data = open_data(run)
    identity = make_identity(run.model, data.pipeline.tokenizer)
    with joined(run) as device:
        start = find_start(run, identity)
        prepare_run_dir(run)
        stop = StopRequest(run.run_dir)
        trainer = make_trainer(run, data, device)
        progress = load_start(start, trainer)
        saver = CheckpointSaver(
            run.run_dir, config.checkpoint, identity, trainer.bare_model, trainer.optimizer, trainer.scheduler
        )
        reports = Reports(
            MetricsWriter(run.run_dir, config.logging, progress.step, config.training.train_steps),
            SampleWriter(run.run_dir, progress.step, config.data.ledger),
        )
        outcome = train(trainer, progress, reports, stop, saver)
        reports.close()
        trainer.loader.close()
        if not outcome.finished:
            say(f"stopped after step {outcome.progress.step}, saved; the same command resumes from there")
        else:
            if global_rank() == 0:
                run.run_dir.finished.write_text(f"{outcome.progress.step}\n")
            say(f"finished after step {outcome.progress.step}; everything is in {run.run_dir}")


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="megatron_nvlm.train", description="Train NVLM-D, NVLM-X or NVLM-H.")
    parser.add_argument("--config", required=True, help="run file, or the name of one of configs/")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    run_training(load_run(options.config, options.overrides))


if __name__ == "__main__":
    sys.exit(main())
