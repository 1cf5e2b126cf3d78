"""What decides which sample comes when, as a checkpoint keeps it: the sets by content, their shares, seed and packing."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from megatron_nvlm.data.config import DataConfig
from megatron_nvlm.data.prepare import SamplePipeline
from megatron_nvlm.data.shards.read import ShardSet

PACKED_KEYS = (
    *("data.packing.window_samples", "data.sequence_length", "data.template", "data.system"),
    *("tiling.max_tiles", "tiling.tag_format", "tiling.thumbnail_tag", "data.too_long"),
)
"""Keys that decide the order of samples where they are packed."""


def data_fingerprint(config: DataConfig, sets: Sequence[ShardSet], pipeline: SamplePipeline) -> dict[str, Any]:
    """Fingerprint of the data by key of the run file. Equal fingerprints give equal orders, wherever the sets lie.

    Sets count by the hashes of their shards and by their share of the weights; sets of weight 0 do not count. With
    packing, the keys that decide how long a sample is are added, since its packs follow from them.
    """
    total = sum(source.weight for source in config.train)
    fingerprint: dict[str, Any] = {
        "data.train": [
            [number, content_of(shards), source.weight / total]
            for number, (source, shards) in enumerate(zip(config.train, sets, strict=True))
            if source.weight
        ],
        "data.seed": config.seed,
        "data.shuffle_window_shards": config.shuffle_window_shards,
        "data.packing.enabled": config.packing.enabled,
    }
    if config.packing.enabled:
        tiling = pipeline.tiling
        values = (
            *(config.packing.window_samples, config.sequence_length, config.template, config.system),
            *(tiling.max_tiles, tiling.tag_format, tiling.thumbnail_tag, config.too_long),
        )
        fingerprint |= zip(PACKED_KEYS, values, strict=True)
        if config.too_long == "reject":
            del fingerprint["data.too_long"]  # checkpoints of before it could be chosen do not name it
    return fingerprint


def content_of(shards: ShardSet) -> str:
    """Hash of a set: of its shards' own hashes and sizes, in their order."""
    listed = [[shard["sha256"], shard["num_samples"]] for shard in shards.index.shards]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
