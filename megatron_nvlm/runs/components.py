"""From sections of a run to its parts, for training and inference alike. Users' mistakes end here, before work begins."""

from dataclasses import dataclass
from typing import TypeVar

import torch

from megatron_nvlm.hf.open_folders import FolderWeights, expected_names, open_folders, refuse_missing_components
from megatron_nvlm.checkpoint.save_load import Identity
from megatron_nvlm.data.loading.loader import DataConfig
from megatron_nvlm.data.order.order import BlendedOrder
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.data.prepare import SamplePipeline
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.models.build import ModelConfig, build_chunks, build_model, resolve_model
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.models.initialise import initialise, mark_splits
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.families.sizes import LANGUAGE_PRESETS, VISION_PRESETS, name_of
from megatron_nvlm.parallel.device import DTYPES
from megatron_nvlm.parallel.groups import get_groups, get_single_rank_groups
from megatron_nvlm.text.tokenizer import Tokenizer

Built = TypeVar("Built", NVLMModel, ModelChunks)


@dataclass(frozen=True)
class OpenedData:
    """Opened data: everything that can be wrong with it has been looked for."""

    sets: list[ShardSet]
    order: BlendedOrder
    pipeline: SamplePipeline


def open_data(data: DataConfig, tiling: TilingConfig, model: ModelConfig) -> OpenedData:
    """Open shards and tokenizer; needs no process groups."""
    parts = resolve_model(model)
    tokenizer = Tokenizer.load(data.tokenizer)
    if tokenizer.vocab_size > parts.language.vocab_size:
        raise UserError(
            f"the tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids and {model.language} embeds "
            f"{parts.language.vocab_size}; use the tokenizer of that language model"
        )
    if not data.train:
        raise UserError("data.train names no shards; add a path and a weight")
    sets = [ShardSet(source.path, cache=data.cache) for source in data.train]
    for shards in sets:
        tile_size = shards.index.settings.get("tile_size", tiling.tile_size)
        if tile_size != tiling.tile_size:
            raise UserError(
                f"the shards in {shards.folder} hold tiles of {tile_size} pixels and tiling.tile_size is "
                f"{tiling.tile_size}; build them with that size"
            )
    order = BlendedOrder(
        [shards.index.shard_sizes for shards in sets],
        [source.weight for source in data.train],
        data.seed,
        data.shuffle_window_shards,
    )
    return OpenedData(sets, order, make_pipeline(data, tiling, model, tokenizer))


def make_pipeline(data: DataConfig, tiling: TilingConfig, model: ModelConfig, tokenizer: Tokenizer) -> SamplePipeline:
    """The arrows from stored samples to rows, for this model."""
    parts = resolve_model(model)
    return SamplePipeline(
        tokenizer=tokenizer,
        tiling=tiling,
        variant=parts.variant,
        tokens_per_tile=parts.vision.tokens_per_tile,
        sequence_length=data.sequence_length,
        template=data.template,
        system=data.system,
    )


def make_identity(model: ModelConfig, tokenizer: Tokenizer | None) -> Identity:
    """What a checkpoint of this run is of; weights that came without a tokenizer are of none."""
    parts = resolve_model(model)
    language, vision = name_of(LANGUAGE_PRESETS, parts.language), name_of(VISION_PRESETS, parts.vision)
    return Identity(model.variant, language, vision, tokenizer.fingerprint if tokenizer else "")


def make_model(
    model: ModelConfig, parallelism: ParallelismConfig, precision: str, device: torch.device, seed: int
) -> NVLMModel:
    """This rank's stage with new weights."""
    built = build_model(model, parallelism, get_groups(), get_single_rank_groups(), DTYPES[precision], device)
    return _with_new_weights(built, seed)


def make_chunks(
    model: ModelConfig, parallelism: ParallelismConfig, precision: str, device: torch.device, seed: int
) -> ModelChunks:
    """All that this rank holds, with new weights: for training, where a stage may be several chunks."""
    built = build_chunks(model, parallelism, get_groups(), get_single_rank_groups(), DTYPES[precision], device)
    return _with_new_weights(built, seed)


def open_weights(model: ModelConfig) -> FolderWeights | None:
    """The Hugging Face folders that the model names; None if it names none.

    Raises:
        UserError: whatever can be wrong with them, before work begins.
    """
    weights = open_folders(model)
    if weights is not None:
        refuse_missing_components(list(weights.ours.infos), expected_names(model, resolve_model(model)), "the run")
    return weights


def _with_new_weights(built: Built, seed: int) -> Built:
    mark_splits(built)
    initialise(built, seed)
    return built
