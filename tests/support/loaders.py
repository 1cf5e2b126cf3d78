"""Small counted shards, and what loaders over them are made with."""

from pathlib import Path
from typing import Any

from megatron_nvlm.data.order.lengths import TextTokenCounter
from megatron_nvlm.data.order.order import BlendedOrder
from megatron_nvlm.data.order.packing import PackingConfig
from megatron_nvlm.data.prepare import SamplePipeline
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.shards import Sample, write_samples

PACKING = PackingConfig(enabled=True, window_samples=10)


def counted_samples(folder: Path, samples: list[Sample], tokenizer: Tokenizer) -> Path:
    """Shards whose text is counted, as packing needs."""
    counter = TextTokenCounter(tokenizer, "chatml", None)
    return write_samples(folder, samples, count_text=counter, text=counter.description)


def loader_arguments(
    folder: Path, tokenizer: Tokenizer, replica: tuple[int, int] = (0, 1), packed: bool = False
) -> tuple[Any, ...]:
    """Of a MicroBatchLoader, in order: steps of eight samples, or of four packs (with `packing=PACKING`)."""
    shards = ShardSet(folder)
    order = BlendedOrder([shards.index.shard_sizes], [1], 1, 2)
    pipeline = SamplePipeline(tokenizer, TilingConfig(tile_size=56), VARIANTS["h"], 4, 256, "chatml", None)
    return ([shards], order, pipeline, *((1, 4) if packed else (2, 8)), replica)
