"""Entry point of training: `torchrun --nproc-per-node N -m megatron_nvlm.train --config FILE.yaml [key=value ...]`."""

import sys
from dataclasses import replace

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.config.load import load_run
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.option_types import LaunchedParser
from megatron_nvlm.parallel.groups import world_size_from_environment
from megatron_nvlm.runs.changes import settings_of
from megatron_nvlm.runs.components import make_identity, open_data, open_validation
from megatron_nvlm.runs.entry import global_rank, print_to_rank_file, say, user_errors_end_the_process
from megatron_nvlm.runs.length import count_steps
from megatron_nvlm.runs.processes import joined, mark_end, prepare_run_dir
from megatron_nvlm.runs.resolve import resolve_run
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.runs.start import find_start, keep_multiples, load_start
from megatron_nvlm.runs.trainer import make_trainer
from megatron_nvlm.trackers.config import check_installed
from megatron_nvlm.training.faults import StopRequest, stop_with_launcher
from megatron_nvlm.training.loop import Reports, train
from megatron_nvlm.training.metrics import MetricsWriter
from megatron_nvlm.training.optimizer import config_in_force
from megatron_nvlm.training.profiling import StepProfiler
from megatron_nvlm.training.sample_files import SampleWriter
from megatron_nvlm.training.skipped_updates import SkippedUpdates, read_steps
from megatron_nvlm.training.stragglers import StragglerWatch
from megatron_nvlm.training.watchdog import Watchdog


def run_training(config: RunConfig) -> None:
    """Train a run from where it stands: from its last checkpoint if there is one."""
    stop = StopRequest(RunDir.named(config.run_dir))  # first: a request while starting counts
    stop_with_launcher()
    run = resolve_run(config, world_size_from_environment())
    check_installed(config.logging.wandb, config.logging.mlflow)
    data = open_data(run)
    run = count_steps(run, data)
    validation = open_validation(run, data.pipeline)
    identity = make_identity(run.config, run.model, data.pipeline.tokenizer, data)
    with joined(run) as device, Watchdog(config.training.limits, run.run_dir) as watchdog:
        start = find_start(run, identity)
        run = keep_multiples(start, run)
        trainer = make_trainer(run, data, device, validation, start.loads)
        progress = load_start(start, trainer)
        if start.checkpoint is not None and start.keep_schedule:
            in_force = config_in_force(run.config.optimizer, trainer.optimizer, trainer.scheduler)
            config = replace(config, optimizer=in_force)
            identity = replace(identity, settings=settings_of(replace(run.config, optimizer=in_force), run.model))
        prepare_run_dir(run.run_dir, config)
        saver = CheckpointSaver(
            run.run_dir, config.checkpoint, identity, trainer.bare_model, trainer.optimizer, trainer.scheduler
        )
        earlier = read_steps(run.run_dir.metrics, progress.step, config.stability.window_steps)
        updates = SkippedUpdates(config.stability, earlier)
        reports = Reports(
            MetricsWriter(run.run_dir, config.logging, progress.step, run.train_steps),
            SampleWriter(run.run_dir, progress.step, config.data.ledger),
            StragglerWatch(config.logging.straggler_steps, device.torch_device),
            StepProfiler(
                config.training.profile,
                config.training.profile_ranks,
                global_rank(),
                run.run_dir,
                device.torch_device,
            ),
        )
        outcome = train(trainer, progress, reports, stop, saver, updates, watchdog)
        mark_end(run.run_dir, outcome.progress.step, outcome.finished)  # first: trackers may take their time
        reports.close()
        trainer.loader.close()
        if not outcome.finished and outcome.progress.step == 0:
            say("stopped before the first step; the same command begins again")
        elif not outcome.finished:
            say(f"stopped after step {outcome.progress.step}, saved; the same command resumes from there")
        else:
            say(f"finished after step {outcome.progress.step}; everything is in {run.run_dir}")


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = LaunchedParser(prog="megatron_nvlm.train", description="Train NVLM-D, NVLM-X or NVLM-H.")
    parser.add_argument("--config", required=True, help="run file, or the name of one of configs/")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    config = load_run(options.config, options.overrides)
    if config.logging.rank_files:
        print_to_rank_file(RunDir.named(config.run_dir))
    run_training(config)


if __name__ == "__main__":
    sys.exit(main())
