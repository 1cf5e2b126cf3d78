"""Entry point of training: `torchrun --nproc-per-node N -m megatron_nvlm.train --config FILE.yaml [section.key=value ...]`."""

import argparse
import os
import sys
import warnings
from pathlib import Path

# Megatron-core says at import which GPU libraries it did not find; a run on a CPU need not hear it on every rank.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core.*")
warnings.filterwarnings("ignore", message="Apex is not installed.*")

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.config.load import dump_run, load_run
from megatron_nvlm.config.rules import check_files, check_run
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.errors import UserError
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import start_groups, stop_groups, world_size_from_environment
from megatron_nvlm.training import setup
from megatron_nvlm.training.faults import FINISHED_FILE, StopRequest
from megatron_nvlm.training.loop import train
from megatron_nvlm.training.metrics import MetricsWriter


def run_training(run: RunConfig) -> None:
    """Train a run from where it stands: from its last checkpoint if there is one."""
    run_dir = Path(run.run_dir)
    check_run(run, world_size_from_environment())
    check_files(run)
    parts = setup.open_data(run.data, run.tiling, run.model)
    identity = setup.make_identity(run.model, parts.pipeline.tokenizer)
    checkpoint = save_load.latest_checkpoint(run_dir)
    if checkpoint is not None:
        save_load.check_identity(checkpoint, identity)

    device = use_device()
    start_groups(run.parallelism, device, run.training.seed, run.training.timeout_seconds)
    setup.prepare_run_dir(run_dir, dump_run(run))
    stop = StopRequest(run_dir)
    trainer = setup.make_trainer(
        run.model,
        run.parallelism,
        run.stage,
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
        _say(f"going on from step {start.step} ({checkpoint})")
    writer = MetricsWriter(run_dir, run.logging, start.step, run.training.train_steps)

    def save(progress: save_load.Progress) -> None:
        save_load.save(run_dir, run.checkpoint, progress, identity, *state)

    outcome = train(trainer, start, writer, stop, save)
    writer.close()
    if outcome.finished:
        if _rank() == 0:
            (run_dir / FINISHED_FILE).write_text(f"{outcome.progress.step}\n")
        _say(f"finished after step {outcome.progress.step}; everything is in {run_dir}")
    else:
        _say(f"stopped after step {outcome.progress.step}, saved; the same command goes on from there")
    stop_groups()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(text: str) -> None:
    if _rank() == 0:
        print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 for a mistake that the user can mend, said in one sentence."""
    parser = argparse.ArgumentParser(prog="megatron_nvlm.train", description="Train NVLM-D, NVLM-X or NVLM-H.")
    parser.add_argument("--config", required=True, help="run file, see configs/")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    try:
        run_training(load_run(options.config, options.overrides))
    except UserError as error:
        # Every rank reads the same files and meets the same mistake; a mistake of one rank alone names it.
        prefix = "" if _rank() == 0 else f"rank {_rank()}: "
        print(f"error: {prefix}{error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
