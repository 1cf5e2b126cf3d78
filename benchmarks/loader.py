"""How fast data arrives: a bare decode loop, plain webdataset, Megatron-Energon (if installed) and ours, on the same shards.

`python -m benchmarks.loader [--samples 256 | --shards DIR] [--seconds 10] [--out FILE.json]`

The shards are made for the run: crops of scikit-learn's photographs in many shapes, cut in tiles of 448 pixels; or they are
those of `megatron_nvlm/demo/material.py --shards`. Each form
runs alone, for the given time, after it has warmed up; all in one call, so that they meet the same machine. Every form but
the bare loop yields the same thing: packed uint8 tiles and token rows of micro-batches. Processor time is printed beside
the rate, since a shared machine moves the clock and not the work.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from megatron_nvlm.data.collate import build_micro_batch
from megatron_nvlm.data.config import DataConfig
from megatron_nvlm.data.loading.builder import BatchSettings, OpenedData
from megatron_nvlm.data.loading.loader import MicroBatchLoader
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.data.order.order import BlendedOrder
from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.data.shards.index import IMAGE_DTYPE, IMAGES_FILE, INDEX_FILE, SAMPLE_DTYPE, SAMPLES_FILE
from megatron_nvlm.data.shards.read import RawSample, ShardSet, ShardWriter
from megatron_nvlm.image.pixels import decode_image, to_array
from megatron_nvlm.image.tiling import TilingConfig, choose_grid, cut_tiles
from megatron_nvlm.option_types import positive_float, positive_int
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer

TILE_SIZE, MAX_TILES, TOKENS_PER_TILE, SEQUENCE_LENGTH = 448, 6, 256, 4096
ROWS_PER_STEP = 8
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Result:
    """One form's rate and cost."""

    form: str
    workers: int
    tiles_per_second: float
    samples_per_second: float
    cpu_ms_per_tile: float
    """Processor time of parent and workers."""
    memory_mb: float
    """Proportional set size of parent and workers at the end."""


def build_shards(folder: Path, samples: int) -> None:
    """Cut tiles of crops of photographs."""
    rng = random.Random(1)
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    with ShardWriter(folder, samples_per_shard=max(4, samples // 8), settings={"tile_size": TILE_SIZE}) as writer:
        for number in range(samples):
            photograph = rng.choice(photographs)
            width, height = rng.randint(200, 640), rng.randint(140, 427)
            left, top = rng.randint(0, 640 - width), rng.randint(0, 427 - height)
            crop = photograph.crop((left, top, left + width, top + height)).resize((2 * width, 2 * height))
            grid = choose_grid(*crop.size, MAX_TILES, TILE_SIZE)
            regular = range(1, grid.num_tiles + 1) if grid.num_tiles > 1 else ()
            pictures = {}
            names = [*(f"tile_{tile}" for tile in regular), "thumbnail"]
            for name, tile in zip(names, cut_tiles(crop, grid, TILE_SIZE), strict=True):
                buffer = io.BytesIO()
                tile.save(buffer, "JPEG", quality=JPEG_QUALITY)
                pictures[f"0.{name}.jpg"] = buffer.getvalue()
            turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A photograph. " * 8}]
            image = {"width": crop.width, "height": crop.height, "grid": list(grid)}
            writer.write(
                f"sample_{number:06d}", {"conversation": turns, "images": [image], "source": "photo"}, pictures
            )


def make_pipeline() -> SamplePipeline:
    """NVLM-D's, with a small vocabulary."""
    tokenizer = Tokenizer(qwen2_tokenizer(4096))
    tiling = TilingConfig(TILE_SIZE, MAX_TILES)
    return SamplePipeline(tokenizer, tiling, VARIANTS["d"], TOKENS_PER_TILE, SEQUENCE_LENGTH, "chatml", None)


def bare(shards: ShardSet) -> Iterator[int]:
    """Read and decode, nothing else; yields tiles of a sample."""
    while True:
        for number in range(len(shards)):
            sample = shards.read(number)
            yield len([to_array(decode_image(data)) for data in sample.pictures.values()])


def make_loader(data: OpenedData, workers: int = 0) -> MicroBatchLoader:
    """Steps of ROWS_PER_STEP micro-batches of one sample."""
    config = DataConfig(train=[], tokenizer="", sequence_length=data.pipeline.sequence_length, num_workers=workers)
    return MicroBatchLoader(data, BatchSettings(1, ROWS_PER_STEP), config)


def ours(shards: ShardSet, pipeline: SamplePipeline, workers: int) -> Iterator[int]:
    """This package's loader, rows of one sample."""
    order = BlendedOrder([shards.index.shard_sizes], [1], 1)
    loader = make_loader(OpenedData([shards], order, pipeline), workers)
    position = DataPosition()
    try:
        while True:
            for row in loader.step(position):
                yield len(row.tiles)
            position = loader.after(position)
    finally:
        loader.close()


class PrepareMember:
    """A webdataset or Energon sample -> prepared, by the same pipeline; can be sent to workers."""

    def __init__(self, pipeline: SamplePipeline) -> None:
        self.pipeline = pipeline

    def __call__(self, sample: dict[str, Any]) -> PreparedSample:
        """Its pictures are bytes; its JSON is parsed or not."""
        pictures = {name: data for name, data in sample.items() if name.endswith(".jpg")}
        record = sample["json"]
        record = json.loads(record) if isinstance(record, bytes | str) else record
        return self.pipeline.prepare(RawSample(sample["__key__"], record, pictures))


def plain_webdataset(shards: ShardSet, pipeline: SamplePipeline, workers: int) -> Iterator[int]:
    """webdataset with its own shuffling and torch's workers; the same transforms, the same micro-batches."""
    import webdataset

    urls = [str(path) for path in shards.shard_paths]
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=1, empty_check=False)
    stream = data.repeat().shuffle(64).map(PrepareMember(pipeline))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
    for prepared in loader:
        yield len(build_micro_batch([prepared], pipeline).tiles)


def energon(shards: ShardSet, pipeline: SamplePipeline, workers: int) -> Iterator[int] | None:
    """Megatron-Energon over the same tars, if it is installed."""
    try:
        from benchmarks.loader_energon import stream
    except ImportError:
        return None
    return stream(shards, pipeline, workers)


def measure(form: str, workers: int, stream: Iterator[int], seconds: float) -> Result:
    """Draw for a while."""
    for _ in range(3 * ROWS_PER_STEP):  # workers are up and caches warm
        next(stream)
    tiles = samples = 0
    began, cpu = time.perf_counter(), _cpu_seconds()
    while time.perf_counter() - began < seconds:
        tiles += next(stream)
        samples += 1
    passed = time.perf_counter() - began
    memory = sum(process.memory_full_info().pss for process in _processes()) / 1e6
    cpu = _cpu_seconds() - cpu
    close: Callable[[], None] | None = getattr(stream, "close", None)
    if close is not None:
        close()
    return Result(form, workers, tiles / passed, samples / passed, 1e3 * cpu / tiles, memory)


def _processes() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def _cpu_seconds() -> float:
    total = 0.0
    for process in _processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker of the form before may end just now
            total += sum(process.cpu_times()[:2])
    return total


def measure_resume(folder: Path, pipeline: SamplePipeline, real: ShardSet) -> float:
    """Seconds from nothing to the first micro-batches at sample 10^8 of an index of 10^9 samples in 10^5 shards.

    The index is a sparse file; the samples that the order asks for first are those of a real shard.
    """
    shards, per_shard, start = 100_000, 10_000, 10**8
    folder.mkdir()
    arrays = {SAMPLES_FILE: (SAMPLE_DTYPE, shards * per_shard), IMAGES_FILE: (IMAGE_DTYPE, 64)}
    maps = {
        name: np.lib.format.open_memmap(folder / name, mode="w+", dtype=dtype, shape=(length,))
        for name, (dtype, length) in arrays.items()
    }
    order = BlendedOrder([[per_shard] * shards], [1], 1)
    for place in range(ROWS_PER_STEP * 2):
        number = order(start + place).number
        stored = place % real.index.shard_sizes[0]
        source = real.samples[stored].copy()
        source["first_image"], source["shard"] = place, number // per_shard
        maps[SAMPLES_FILE][number] = source
        maps[IMAGES_FILE][place] = real.index.images[stored]  # one image a sample
    del maps
    name = real.shard_paths[0].name
    os.symlink(real.shard_paths[0].resolve(), folder / name)
    facts = {"name": name, "size": 0, "sha256": "", "num_samples": per_shard}
    write_synthetic_index(folder, [facts] * shards, shards * per_shard)
    began = time.perf_counter()
    opened = ShardSet(folder, check=False)
    fresh = BlendedOrder([opened.index.shard_sizes], [1], 1)
    loader = make_loader(OpenedData([opened], fresh, pipeline))
    rows = list(loader.step(DataPosition(start)))
    seconds = time.perf_counter() - began
    assert len(rows) == ROWS_PER_STEP and not loader.bad and all(row.keys for row in rows), loader.bad
    return seconds


def write_synthetic_index(folder: Path, shards: list[dict[str, Any]], samples: int) -> None:
    """An index.json as write_index makes it, without reading 40 GB of zeros for their hash."""
    from megatron_nvlm.data.shards import index as index_module

    content: dict[str, Any] = {
        "format": index_module.INDEX_FORMAT,
        "num_samples": samples,
        "num_images": 64,
        "settings": {},
        "text": None,
        "files": {
            SAMPLES_FILE: {"size": (folder / SAMPLES_FILE).stat().st_size, "sha256": ""},
            IMAGES_FILE: {
                "size": (folder / IMAGES_FILE).stat().st_size,
                "sha256": index_module.hash_file(folder / IMAGES_FILE),
            },
        },
        "shards": shards,
    }
    (folder / INDEX_FILE).write_text(index_module.sign(json.dumps(content)))


def measure_order() -> tuple[float, float]:
    """(microseconds of sample(i) at random i, of processor time; peak memory in MB)."""
    order = BlendedOrder([[10_000] * 100_000, [5_000] * 1_000], [0.7, 0.3], 1)
    rng = random.Random(1)
    places = [rng.randrange(10**8, 10**9) for _ in range(50_000)]
    for place in places[:1000]:
        order(place)
    began = time.process_time()
    for place in places:
        order(place)
    passed = time.process_time() - began
    return 1e6 * passed / len(places), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--samples", type=positive_int, default=256, help="samples to make for the run")
    parser.add_argument("--shards", type=Path, help="measure on this set of tiles of 448 pixels instead (docs/data.md)")
    parser.add_argument("--seconds", type=positive_float, default=10, help="of each form")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    microseconds, _ = measure_order()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.shards is None:
            build_shards(folder / "shards", options.samples)
        shards, pipeline = ShardSet(options.shards or folder / "shards"), make_pipeline()
        resume = measure_resume(folder / "synthetic", pipeline, shards)
        results = [measure("bare decode", 0, bare(shards), options.seconds)]
        for workers in (0, 1, 2):
            results.append(measure("ours", workers, ours(shards, pipeline, workers), options.seconds))
            stream = plain_webdataset(shards, pipeline, workers)
            results.append(measure("webdataset", workers, stream, options.seconds))
            other = energon(shards, pipeline, workers)
            if other is not None:
                results.append(measure("energon", workers, other, options.seconds))
        results.append(measure("bare decode, again", 0, bare(shards), options.seconds))
    base = (results[0].tiles_per_second + results[-1].tiles_per_second) / 2
    print(f"{'form':20s} workers  tiles/s  samples/s  of bare  CPU ms/tile  memory MB")
    for result in results:
        print(
            f"{result.form:20s} {result.workers:7d} {result.tiles_per_second:8.0f} {result.samples_per_second:10.1f} "
            f"{result.tiles_per_second / base:8.2f} {result.cpu_ms_per_tile:12.2f} {result.memory_mb:10.0f}"
        )
    print(f"sample(i) of 10^9 samples in 10^5 shards: {microseconds:.1f} microseconds of processor time")
    print(f"first step at sample 10^8 of 10^9, from nothing: {resume:.2f} s")
    if options.out:
        numbers = {"results": [asdict(r) for r in results], "sample_microseconds": microseconds, "resume_s": resume}
        options.out.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
