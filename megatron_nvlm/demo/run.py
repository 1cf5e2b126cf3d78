"""The main job on a laptop: `python -m tools.demo --variant h` builds shards, trains, evaluates and writes a report.

Interrupted at any point, the same command goes on from where it was.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.config.load import find_run_file, load_run
from megatron_nvlm.demo import data as demo_data
from megatron_nvlm.demo.report import write_report
from megatron_nvlm.errors import UserError
from megatron_nvlm.option_types import positive_int
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.faults import stop_with_launcher

DATA = Path("runs/demo_data")


class MemoryWatch:
    """The most memory that this process and all below it held at once (proportional share of what they share)."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, AttributeError):
                    continue
            self.peak_bytes = max(self.peak_bytes, total)
            time.sleep(5)  # reading it costs processor time


def build_data(sizes: Sequence[int], seed: int = 1) -> None:
    """Shards, unless they are there; complete or not at all.

    Args:
        sizes: training images, texts, held-out images.
    """
    if (DATA / "sources.json").exists():
        return
    partial = DATA.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(DATA, ignore_errors=True)
    images, texts, heldout = sizes
    demo_data.build(partial, images, texts, heldout, seed)
    partial.rename(DATA)


def torchrun(ranks: int, module: str, *arguments: str) -> None:
    """Start an entry point on several processes and wait; leaves with its status if it fails or is interrupted."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    # One thread a process: two processes share two cores.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen([*command, "-m", module, *arguments], env=environment, preexec_fn=stop_with_launcher)
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:  # the processes got it too; let them save
            continue
    if status:
        print("the demo did not finish; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(status)


def run_demo(variant: str, sizes: Sequence[int], overrides: list[str]) -> Path:
    """Everything; returns the report's path."""
    config = str(find_run_file(f"demo_{variant}"))
    run = load_run(config, overrides)
    ranks = run.parallelism.tensor_model_parallel_size * run.parallelism.pipeline_model_parallel_size
    run_dir = Path(run.run_dir)
    build_data(sizes)
    print(f"shards are in {DATA}; training NVLM-{variant.upper()} on {ranks} processes", flush=True)
    if not RunDir(run_dir).finished.exists():
        torchrun(ranks, "megatron_nvlm.train", "--config", config, *overrides)
        if not RunDir(run_dir).finished.exists():  # asked to stop, and saved
            sys.exit(130)
    # What stands on the parts: digits and capital letters. The names of colours are given in the question.
    arguments = ["--run-dir", str(run_dir), "--batch-size", "32", "--count", "[A-Z0-9]"]
    torchrun(run.parallelism.tensor_model_parallel_size, "megatron_nvlm.evaluate", *arguments)
    return write_report(run_dir)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a tiny NVLM on real pictures, evaluate it, write report.html.")
    parser.add_argument("--variant", choices=("d", "x", "h"), default="h")
    parser.add_argument(
        "--sizes",
        type=positive_int,
        nargs=3,
        default=demo_data.SIZES,
        metavar=("IMAGES", "TEXTS", "HELDOUT"),
        help="samples to build, if there are none yet",
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value of the run file")
    options = parser.parse_args()
    if psutil.Process().parent().name() == "make":  # killed, it could not tell us
        stop_with_launcher()
    began, memory = time.monotonic(), MemoryWatch()
    try:
        report = run_demo(options.variant, options.sizes, options.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    minutes = (time.monotonic() - began) / 60
    print(f"{minutes:.1f} minutes, {memory.peak_bytes / 2**30:.1f} GiB of memory at most")
    print(f"open {report.resolve()}")


if __name__ == "__main__":
    main()
