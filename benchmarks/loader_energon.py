"""Megatron-Energon over the same tars, for benchmarks/loader.py; importing it fails where Energon is not installed."""

import json
from collections.abc import Iterator
from typing import Any

import yaml
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

from megatron_nvlm.data.collate import build_micro_batch
from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.data.shards.read import RawSample, ShardSet


@edataclass
class Prepared(Sample):
    """A sample through our own pipeline."""

    content: PreparedSample


class Encoder(DefaultTaskEncoder):
    """Pictures stay bytes until our pipeline decodes them, so that every form does the same work."""

    decoder = None

    def __init__(self, pipeline: SamplePipeline) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.cookers = [Cooker(self.cook)]

    @stateless
    def cook(self, sample: dict[str, Any]) -> Prepared:
        """Bytes to rows and tiles."""
        pictures = {name: data for name, data in sample.items() if name.endswith(".jpg")}
        record = sample["json"]
        record = json.loads(record) if isinstance(record, bytes | str) else record
        raw = RawSample(sample["__key__"], record, pictures)
        return Prepared(**basic_sample_keys(sample), content=self.pipeline.prepare(raw))

    @stateless
    def batch(self, samples: list[Prepared]) -> list[PreparedSample]:
        """One row."""
        return [sample.content for sample in samples]


def stream(shards: ShardSet, pipeline: SamplePipeline, workers: int) -> Iterator[int]:
    """Tiles of a sample, without end."""
    folder = shards.folder
    if not (folder / ".nv-meta").exists():
        names = sorted(path.name for path in folder.glob("*.tar"))
        BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=1)
        kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
        (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(kind))
    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    data = get_train_dataset(
        folder,
        split_part="train",
        worker_config=config,
        batch_size=1,
        shuffle_buffer_size=64,
        max_samples_per_sequence=64,
        task_encoder=Encoder(pipeline),
    )
    for batch in get_savable_loader(data):
        yield len(build_micro_batch(batch, pipeline).tiles)
