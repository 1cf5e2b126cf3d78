"""Small counted shards, and what loaders over them are made with."""

from pathlib import Path
from typing import Any

from megatron_nvlm.data.config import DataConfig
from megatron_nvlm.data.loading.builder import BatchSettings, OpenedData
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


def data_config(**settings: Any) -> DataConfig:
    """Section `data` for loaders over data that is opened already."""
    return DataConfig(train=[], tokenizer="", sequence_length=256, **settings)


def open_set(folder: Path, tokenizer: Tokenizer, window_shards: int = 2) -> OpenedData:
    """One set of shards, prepared for a tiny NVLM-H."""
    shards = ShardSet(folder)
    order = BlendedOrder([shards.index.shard_sizes], [1], 1, window_shards)
    pipeline = SamplePipeline(tokenizer, TilingConfig(tile_size=56), VARIANTS["h"], 4, 256, "chatml", None)
    return OpenedData([shards], order, pipeline)


def loader_arguments(
    folder: Path, tokenizer: Tokenizer, replica: tuple[int, int] = (0, 1), packed: bool = False, **settings: Any
) -> tuple[OpenedData, BatchSettings, DataConfig]:
    """Of a loader: steps of eight samples, or of four packs."""
    batch = BatchSettings(1, 4, replica) if packed else BatchSettings(2, 8, replica)
    config = data_config(packing=PACKING if packed else PackingConfig(), **settings)
    return open_set(folder, tokenizer), batch, config
