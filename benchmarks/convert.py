"""Conversion's speed and memory beside a plain copy, on a folder with the names and layer shapes of NVLM-D 72B.

    python -m benchmarks.convert [--folder DIR] [--layers 2] [--vision-layers 2] [--repeats 3]

Prints a table: a copy of the files (read, write, flushed to the disk), import and export, each in one run, with gigabytes a
second, share of the copy's speed, and the largest memory that the process took for itself (anonymous memory: pages of mapped
files are the system's cache). The folder is made of random numbers first: few layers, all of the real width, so the
largest tensors are the real ones. Compares with: the copy, in the same run on the same disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.plain_copy import copy_file
from megatron_nvlm.checkpoint.tensor_source import TensorInfo
from megatron_nvlm.hf.config_json import describe_folder
from megatron_nvlm.hf.our_model import describe_our_model
from megatron_nvlm.hf.safetensors_files import file_names, plan_files, write_file, write_index
from megatron_nvlm.hf.weight_tables import nvlm_rows
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.models.config import ModelConfig, resolve_model
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.families.languages import LANGUAGE_PRESETS
from megatron_nvlm.models.families.visions import VISION_PRESETS
from megatron_nvlm.option_types import positive_int


def make_folder(folder: Path, layers: int, vision_layers: int) -> None:
    """A folder of NVLM-D 72B with fewer layers; numbers from a block of random ones, so that making it takes no time."""
    parts = resolve_model(ModelConfig("d", "qwen2_72b", "internvit_6b"))
    language = replace(LANGUAGE_PRESETS["qwen2_72b"], num_layers=layers)
    vision = replace(VISION_PRESETS["internvit_6b"], num_layers=vision_layers)
    model = replace(parts, language=language, vision=vision)
    config = describe_folder(model, TilingConfig(max_tiles=6), "chatml", "bfloat16")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ours = describe_our_model(model)
    infos: dict[str, TensorInfo] = {}
    for row in nvlm_rows(model.variant, language, vision, CrossAttentionConfig()):
        whole = torch.empty(ours.infos[row.ours].shape, dtype=torch.bfloat16, device="meta")
        for name, tensor in zip(row.theirs, row.transform.to_theirs(whole), strict=True):
            infos[name] = TensorInfo.of(tensor)
    block = torch.randn(1 << 22).bfloat16()

    def numbers(name: str) -> Tensor:
        info = infos[name]
        tensor = block.repeat(-(-info.parameters // len(block)))[: info.parameters].view(info.shape)
        if any(part in name for part in ("q_norm", "k_norm")):  # the release's heads of zeros
            tensor[vision.hidden_size :] = 0
        if "attn.proj.weight" in name and "vision" in name:
            tensor[:, vision.hidden_size :] = 0
        if "attn.qkv" in name:
            tensor.view(3, -1, *tensor.shape[1:])[:, vision.hidden_size :] = 0
        return tensor

    files = plan_files(infos, 5 * 10**9)
    for name, file in zip(file_names(len(files)), files, strict=True):
        write_file(folder / name, file, numbers)
    write_index(folder, files)


def copy_folder(source: Path, target: Path) -> None:
    """Every file, flushed to the disk."""
    target.mkdir()
    for path in source.iterdir():
        copy_file(path, target / path.name)


class MemoryWatch:
    """The most anonymous memory of a process, in bytes."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._path = Path(f"/proc/{pid}/status")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            try:
                lines = self._path.read_text().splitlines()
            except OSError:
                return
            found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
            self.peak = max([self.peak, *found])
            time.sleep(0.02)


def run_tool(*arguments: object) -> tuple[float, int]:
    """The real command: seconds, without the start of Python and its imports, and peak memory in bytes."""
    script = (
        "import sys, time\nfrom megatron_nvlm.commands.convert_checkpoint import main\nbegan = time.monotonic()\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    import os\n    os.sync()\n"
        "    print('seconds', time.monotonic() - began)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")},
    )
    memory = MemoryWatch(process.pid)
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(errors)
    return float(output.split("seconds")[-1]), memory.peak


def timed(work: Callable[[], object]) -> float:
    """Seconds, until it is on the disk."""
    began = time.monotonic()
    work()
    os.sync()
    return time.monotonic() - began


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--layers", type=positive_int, default=2, help="of the language model, of 80")
    parser.add_argument("--vision-layers", type=positive_int, default=2, help="of the encoder, of 45")
    parser.add_argument("--repeats", type=positive_int, default=3, help="of each; the fastest counts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        base = Path(temporary)
        make_folder(base / "hf", options.layers, options.vision_layers)
        size = sum(path.stat().st_size for path in (base / "hf").glob("*.safetensors"))
        results: dict[str, tuple[float, int]] = {}
        for _ in range(options.repeats):
            for name in ("copy", "run", "out"):
                shutil.rmtree(base / name, ignore_errors=True)
            found = {"copy": (timed(lambda: copy_folder(base / "hf", base / "copy")), 0)}
            found["import"] = run_tool("import", "--hf", base / "hf", "--variant", "d", "--out", base / "run")
            found["export"] = run_tool("export", "--checkpoint", base / "run", "--out", base / "out")
            for name, (seconds, peak) in found.items():
                best = min(seconds, results[name][0]) if name in results else seconds
                results[name] = (best, max(peak, results.get(name, (0, 0))[1]))
    print(f"{size / 1e9:.2f} GB: {options.layers} of 80 and {options.vision_layers} of 45 layers, bfloat16")
    print(f"{'':<8}{'seconds':>9}{'GB/s':>8}{'of the copy':>13}{'memory, GB':>12}{'72B (159 GB) would take':>25}")
    for name, (seconds, peak) in results.items():
        share, speed = results["copy"][0] / seconds, size / 1e9 / seconds
        memory = f"{peak / 1e9:.2f}" if peak else "-"
        print(f"{name:<8}{seconds:>9.1f}{speed:>8.2f}{share:>12.0%} {memory:>11}{158.8 / speed / 60:>21.0f} min")


if __name__ == "__main__":
    main()
