"""How long training waits for a checkpoint: saves in the background against saves that are waited for, in one run.

`python -m benchmarks.save [--repeats 3] [--folder DIR]`

One process, a decoder of some 40 million weights with the distributed optimizer: weights, float32 copies and two moments.
Each save is followed by pretended training (sleep) until it is complete, so that forms do not disturb each other; "first" is
shown apart, since it plans. A plain copy of the written files, with fsync, shows what the disk gives.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.plain_copy import copy_file
from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.checkpoint.save_load import CheckpointConfig, Identity, Progress
from megatron_nvlm.core_compat import keep_checkpoint_process
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.models.config import ModelConfig, resolve_model
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.families.languages import LANGUAGE_PRESETS
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.option_types import positive_int
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import start_groups, stop_groups
from megatron_nvlm.runs.components import make_chunks
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.step import wrap_model

SIZES = LanguagePreset(4, 768, 2048, 12, 4, 8192, 10_000, "qwen2")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=positive_int, default=3)
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    options = parser.parse_args()
    device, parallelism = use_device(), ParallelismConfig()
    start_groups(parallelism, device, seed=1)
    keep_checkpoint_process()
    LANGUAGE_PRESETS["benchmark"] = SIZES
    chunks = make_chunks(
        resolve_model(ModelConfig("d", "benchmark", "tiny")),
        parallelism,
        PRECISIONS["fp32"],
        device.torch_device,
        seed=1,
    )
    models = wrap_model(chunks, PRECISIONS["fp32"], use_distributed_optimizer=True)
    settings = OptimizerConfig(max_lr=1e-4, min_lr=1e-4, warmup_steps=0)
    optimizer, scheduler = build_optimizer(settings, models, 10, PRECISIONS["fp32"], use_distributed_optimizer=True)
    for model in models:
        model.zero_grad_buffer()
    optimizer.step()  # makes the moments
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = []
        for name, asynchronous in (("waited for", False), ("in the background", True)):
            config = CheckpointConfig(asynchronous=asynchronous, keep_last=1)
            identity = Identity("d", "benchmark", "tiny", "0")
            saver = CheckpointSaver(
                RunDir(Path(folder) / str(asynchronous)), config, identity, chunks, optimizer, scheduler
            )
            waits, totals = [], []
            for step in range(1, options.repeats + 2):
                began = time.monotonic()
                saver.save(Progress(step, DataPosition(step)))
                while saver.in_flight:
                    time.sleep(0.2)
                    saver.poll()
                totals.append(time.monotonic() - began)
                waits.append(saver.take_waited())
            rows.append((name, waits[0], statistics.median(waits[1:]), statistics.median(totals[1:])))
        files = [path for path in (Path(folder) / "True" / "checkpoints").glob("step_*/*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        copy = _seconds_to_write(files, Path(folder) / "copy")
    print(f"{size / 1e6:.0f} MB a checkpoint; a plain copy of its files with fsync takes {copy:.2f} s\n")
    print("| save | training waits, first (s) | training waits (s) | until complete (s) |\n|---|---|---|---|")
    for name, first, wait, total in rows:
        print(f"| {name} | {first:.2f} | {wait:.2f} | {total:.2f} |")
    stop_groups()


def _seconds_to_write(files: list[Path], copy: Path) -> float:
    began = time.monotonic()
    for path in files:
        copy_file(path, copy)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
