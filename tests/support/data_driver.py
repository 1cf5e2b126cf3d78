"""A trainer without a model: draws steps, writes the keys down, saves its position now and then. To be killed.

`python -m tests.support.data_driver STATE SHARDS --replicas N --workers W --steps S [--packed]`
"""

import argparse
import json
import os
import time
from pathlib import Path

from megatron_nvlm.data.loading.builder import BatchSettings, OpenedData
from megatron_nvlm.data.loading.loader import MicroBatchLoader
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.data.order.order import BlendedOrder
from megatron_nvlm.data.order.packing import PackingConfig
from megatron_nvlm.data.prepare import SamplePipeline
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.loaders import data_config

SAVE_EVERY_STEPS = 2
ROWS = 8
PACKING = PackingConfig(enabled=True, window_samples=20)


def make_loaders(shards: list[Path], replicas: int, workers: int, packed: bool) -> list[MicroBatchLoader]:
    sets = [ShardSet(folder) for folder in shards]
    weights = [len(opened) for opened in sets]  # every set once an epoch
    order = BlendedOrder([opened.index.shard_sizes for opened in sets], weights, 3, 2)
    tokenizer = Tokenizer(qwen2_tokenizer(1024))
    pipeline = SamplePipeline(tokenizer, TilingConfig(tile_size=56), VARIANTS["h"], 4, 256, "chatml", None)
    packing = PACKING if packed else PackingConfig()
    config = data_config(packing=packing, num_workers=workers, prefetch_samples=8)
    data = OpenedData(sets, order, pipeline)
    return [MicroBatchLoader(data, BatchSettings(1, ROWS, (rank, replicas)), config) for rank in range(replicas)]


def run(state: Path, loaders: list[MicroBatchLoader], steps: int, pause: float) -> None:
    state.mkdir(parents=True, exist_ok=True)
    saved, ledger = state / "position.json", state / "ledger.jsonl"
    step, position = 0, DataPosition()
    if saved.exists():
        content = json.loads(saved.read_text())
        step, position = content["step"], DataPosition(**content["position"])
    lines = ledger.read_text().splitlines()[:step] if ledger.exists() else []
    ledger.write_text("".join(f"{line}\n" for line in lines))
    with ledger.open("a", buffering=1) as file:
        while step < steps:
            drawn = [list(loader.step(position)) for loader in loaders]
            keys = [key for turn in zip(*drawn, strict=True) for row in turn for key in row.keys]
            file.write(json.dumps(keys) + "\n")
            step, position = step + 1, loaders[0].after(position)
            if step % SAVE_EVERY_STEPS == 0 or step == steps:
                partial = Path(f"{saved}.partial")
                partial.write_text(json.dumps({"step": step, "position": vars(position)}))
                os.replace(partial, saved)
            time.sleep(pause)
    for loader in loaders:
        loader.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("state", type=Path)
    parser.add_argument("shards", type=Path, nargs="+")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--packed", action="store_true")
    options = parser.parse_args()
    loaders = make_loaders(options.shards, options.replicas, options.workers, options.packed)
    run(options.state, loaders, options.steps, pause=0.02)


if __name__ == "__main__":
    main()
