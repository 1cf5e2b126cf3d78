"""Small real shards and a run file that trains on them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from megatron_nvlm.data.shards.read import ShardWriter
from megatron_nvlm.image.tiling import Grid, cut_tiles
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer

Sample = tuple[dict[str, Any], dict[str, bytes]]
"""Record and pictures."""


def picture(width: int, height: int, kind: str = "PNG", seed: int = 0) -> bytes:
    """Bytes of a noisy image file."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def record(question: str, answer: str, images: int = 1) -> dict[str, Any]:
    """A sample's JSON."""
    return {
        "conversation": [{"from": "human", "value": "<image>" * images + question}, {"from": "gpt", "value": answer}],
        "images": [{}] * images,
        "source": "test",
    }


def cut_sample(*grids: Grid, tile_size: int = 56) -> Sample:
    """A sample whose images are cut in advance."""
    pictures = {}
    for number, grid in enumerate(grids):
        image = Image.open(io.BytesIO(picture(grid.cols * tile_size, grid.rows * tile_size, seed=number)))
        regular = range(1, grid.num_tiles + 1) if grid.num_tiles > 1 else ()
        names = [*(f"tile_{tile}" for tile in regular), "thumbnail"]
        for name, tile in zip(names, cut_tiles(image, grid, tile_size), strict=True):
            buffer = io.BytesIO()
            tile.save(buffer, "JPEG", quality=90)
            pictures[f"{number}.{name}.jpg"] = buffer.getvalue()
    content = record("Which?", "this", images=len(grids))
    content["images"] = [
        {"width": grid.cols * tile_size, "height": grid.rows * tile_size, "grid": list(grid)} for grid in grids
    ]
    return content, pictures


def write_samples(folder: Path, samples: list[Sample], key_prefix: str = "sample", **settings: Any) -> Path:
    """Shards of (record, pictures); `settings` as of ShardWriter."""
    with ShardWriter(folder, **{"samples_per_shard": 8, **settings}) as writer:
        for number, (content, pictures) in enumerate(samples):
            writer.write(f"{key_prefix}_{number:04d}", content, pictures)
    return folder


def good_samples(count: int) -> list[Sample]:
    """Whole images of several sizes, several images in a sample, text only."""
    samples: list[Sample] = []
    for number in range(count):
        if number % 4 == 3:
            samples.append((record(f"Say {number}.", str(number), images=0), {}))
        elif number % 4 == 2:
            pictures = {"0.png": picture(60, 60, seed=number), "1.png": picture(120, 60, seed=number)}
            samples.append((record("Which?", "both", images=2), pictures))
        else:
            size = (168, 112) if number % 4 else (50, 200)
            samples.append((record("What?", f"it is {number}"), {"0.png": picture(*size, seed=number)}))
    return samples


def write_run(folder: Path, train: Path | None = None, **sections: Any) -> Path:
    """A run file for the tiny model; `sections` replace or add keys of sections."""
    folder.mkdir(parents=True, exist_ok=True)
    if train is None:
        train = write_samples(folder / "shards", good_samples(24))
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        qwen2_tokenizer(1024).save(str(tokenizer))
    run: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {
            "variant": "h",
            "language": "tiny",
            "vision": "tiny",
            "init_std": 0.06,
            "cross_attention": {"interval": 2},
        },
        "tiling": {"tile_size": 56, "max_tiles": 6},
        "recipe": {"trainable": ["vision_model", "vision_projection", "cross_attention", "language_model"]},
        "data": {
            "train": [{"path": str(train), "weight": 1.0}],
            "tokenizer": str(tokenizer),
            "sequence_length": 256,
        },
        "optimizer": {"max_lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2},
        "training": {"micro_batch_size": 2, "global_batch_size": 4, "train_steps": 6, "precision": "fp32"},
        "checkpoint": {"save_every_steps": 2},
        "logging": {"log_every_steps": 1, "tensorboard": False},
    }
    for section, values in sections.items():
        run[section] = {**run.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The steps of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
