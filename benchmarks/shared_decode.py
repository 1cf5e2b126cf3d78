"""What a rank spends on reading and decoding a step, alone and as one of several ranks that share the step's tiles.

`python -m benchmarks.shared_decode [--samples 128] [--steps 4]`

The shards are made for the run (benchmarks/loader.py), a step is `--samples` samples in rows of one. The first line of the
table is the loader that decodes everything, as every rank of a model replica did; the others are the middle rank of so many,
in one process (what ranks tell each other of broken images is left out). Processor time, since a shared machine moves the
clock.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.loader import build_shards, make_pipeline
from megatron_nvlm.data.config import DataConfig
from megatron_nvlm.data.loading.builder import BatchSettings, OpenedData
from megatron_nvlm.data.loading.loader import Loader, MicroBatchLoader
from megatron_nvlm.data.loading.shared_decoding import SharingLoader, TileShare
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.data.order.order import BlendedOrder
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.option_types import positive_int

RANKS = (1, 2, 4, 8, 32)


def measure(loader: Loader, steps: int) -> tuple[float, float]:
    """(processor seconds, tiles of this rank) of a step, after one to warm up."""
    list(loader.step(DataPosition()))
    position, tiles = loader.after(DataPosition()), 0
    began = time.process_time()
    for _ in range(steps):
        tiles += sum(len(row.tiles) for row in loader.step(position))
        position = loader.after(position)
    return (time.process_time() - began) / steps, tiles / steps


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--samples", type=positive_int, default=128, help="of a step, and of the set")
    parser.add_argument("--steps", type=positive_int, default=4, help="steps to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = make_pipeline()
    with tempfile.TemporaryDirectory() as name:
        build_shards(Path(name) / "shards", options.samples)
        shards = ShardSet(Path(name) / "shards")
        order = BlendedOrder([shards.index.shard_sizes], [1], 1)
        config = DataConfig(train=[], tokenizer="", sequence_length=pipeline.sequence_length)
        everything = (OpenedData([shards], order, pipeline), BatchSettings(1, options.samples), config)
        whole, tiles = measure(MicroBatchLoader(*everything), options.steps)
        print("ranks  tiles of a rank  CPU s/step  of decoding everything")
        print(f"  all {tiles:16.1f} {whole:11.2f} {1:23.2f}")
        for ranks in RANKS:
            share = TileShare(ranks // 2, ranks, lambda found: found)
            seconds, tiles = measure(SharingLoader(share, *everything), options.steps)
            print(f"{ranks:5d} {tiles:16.1f} {seconds:11.2f} {seconds / whole:23.2f}")


if __name__ == "__main__":
    main()
