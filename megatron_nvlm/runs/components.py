"""What a run is made of: data, pipeline, identity, model and weights, for training and inference alike."""

from collections.abc import Callable
from typing import TypeVar

import torch

from megatron_nvlm.checkpoint.save_load import Identity
from megatron_nvlm.config.rules import check_data, check_files, check_sets
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.data.config import ValidationSet
from megatron_nvlm.data.fingerprint import data_fingerprint
from megatron_nvlm.data.loading.builder import ListedData, OpenedData, check_text_counts, make_counter
from megatron_nvlm.data.order.listed import ListedBatchPlan, list_micro_batches, list_samples
from megatron_nvlm.data.order.order import BlendedOrder
from megatron_nvlm.data.prepare import SamplePipeline
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.data.shards.remote import CacheConfig
from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.open_folders import FolderWeights, expected_names, open_folders, refuse_missing_components
from megatron_nvlm.models.build import build_chunks, build_model
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.models.config import ResolvedModel
from megatron_nvlm.models.families.languages import LANGUAGE_PRESETS
from megatron_nvlm.models.families.presets import name_of
from megatron_nvlm.models.families.visions import VISION_PRESETS
from megatron_nvlm.models.initialise import initialise, mark_splits
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.precision import Precision
from megatron_nvlm.parallel.groups import get_groups, get_single_rank_groups
from megatron_nvlm.runs.changes import settings_of
from megatron_nvlm.runs.resolve import ResolvedRun
from megatron_nvlm.text.tokenizer import Tokenizer

Built = TypeVar("Built", NVLMModel, ModelChunks)


def open_data(run: ResolvedRun) -> OpenedData:
    """Open shards and tokenizer; needs no process groups.

    Raises:
        UserError: a file is missing or does not fit the run.
    """
    data = run.config.data
    tokenizer = load_tokenizer(run)
    sets = [ShardSet(source.path, cache=data.cache) for source in data.train]
    check_data(run.config, run.model, tokenizer, sets)
    order = BlendedOrder(
        [shards.index.shard_sizes for shards in sets],
        [source.weight for source in data.train],
        data.seed,
        data.shuffle_window_shards,
    )
    return OpenedData(sets, order, make_pipeline(run, tokenizer))


def open_validation(run: ResolvedRun, pipeline: SamplePipeline) -> ListedData | None:
    """Open the shards of `validation.sets` and list their samples; None if there are none. Needs no process groups.

    Raises:
        UserError: a set is missing, empty, or does not fit the run.
    """
    config = run.config
    if not config.validation.sets:
        return None
    sets = [_open_validation_set(one, config.data.cache) for one in config.validation.sets]
    check_sets(config, sets)
    if config.data.packing.enabled:
        check_text_counts(sets, pipeline)
    indexes = [shards.index for shards in sets]
    counts = [config.validation.samples if one.samples is None else one.samples for one in config.validation.sets]
    order = list_samples(indexes, counts)
    size = config.training.micro_batch_size
    micro_batches = list_micro_batches(order, indexes, config.data.packing, size, make_counter(pipeline))
    stages = config.parallelism.pipeline_model_parallel_size
    interleaved = config.parallelism.virtual_pipeline_model_parallel_size > 1
    multiple = run.replicas * (stages if interleaved else 1)
    plan = ListedBatchPlan(micro_batches, config.training.global_batch_size // size, multiple)
    return ListedData(sets, order, pipeline, plan)


def _open_validation_set(one: ValidationSet, cache: CacheConfig) -> ShardSet:
    where = f"validation.sets, {one.label}"
    try:
        shards = ShardSet(one.path, cache=cache)
    except UserError as error:
        raise UserError(f"{where}: {str(error).replace('correct data.train', 'correct its path')}") from error
    if not len(shards):
        raise UserError(f"{where}: {one.path} holds no samples; build it again, or leave it out")
    return shards


def load_tokenizer(run: ResolvedRun) -> Tokenizer:
    """The run's tokenizer; UserError if it is not there."""
    check_files(run.config)
    return Tokenizer.load(run.config.data.tokenizer)


def make_pipeline(run: ResolvedRun, tokenizer: Tokenizer) -> SamplePipeline:
    """The pipeline that turns stored samples into sequences for this run's model."""
    data = run.config.data
    return SamplePipeline(
        tokenizer=tokenizer,
        tiling=run.config.tiling,
        variant=run.model.variant,
        tokens_per_tile=run.model.vision.tokens_per_tile,
        sequence_length=data.sequence_length,
        template=data.template,
        system=data.system,
        too_long=data.too_long,
    )


def make_identity(
    config: RunConfig, model: ResolvedModel, tokenizer: Tokenizer | None, data: OpenedData | None = None
) -> Identity:
    """What a checkpoint of this run is of; weights that came without a tokenizer or data are of none."""
    language, vision = name_of(LANGUAGE_PRESETS, model.language), name_of(VISION_PRESETS, model.vision)
    fingerprint = tokenizer.fingerprint if tokenizer else ""
    order = data_fingerprint(config.data, data.sets, data.pipeline) if data else {}
    return Identity(model.variant.name, language, vision, fingerprint, settings_of(config, model), order)


def make_model(
    model: ResolvedModel, parallelism: ParallelismConfig, precision: Precision, device: torch.device
) -> NVLMModel:
    """This rank's stage, whose weights are loaded afterwards."""
    groups = (get_groups(), get_single_rank_groups())
    built = build_model(model, parallelism, *groups, precision.parameter_dtype, device)
    return _with_weights(built, seed=0, is_loaded=lambda name: True)


def make_chunks(
    model: ResolvedModel,
    parallelism: ParallelismConfig,
    precision: Precision,
    device: torch.device,
    seed: int,
    is_loaded: Callable[[str], bool] = lambda name: False,
) -> ModelChunks:
    """All that this rank holds, with new weights: for training, where a stage may be several chunks.

    Args:
        is_loaded: whether a weight of that name is loaded afterwards, and need not be drawn.
    """
    groups = (get_groups(), get_single_rank_groups())
    built = build_chunks(model, parallelism, *groups, precision.parameter_dtype, device)
    return _with_weights(built, seed, is_loaded)


def open_weights(model: ResolvedModel) -> FolderWeights | None:
    """The Hugging Face folders that the model names; None if it names none.

    Raises:
        UserError: whatever can be wrong with them, before work begins.
    """
    weights = open_folders(model)
    if weights is not None:
        refuse_missing_components(list(weights.ours.infos), expected_names(model), "the run")
    return weights


def _with_weights(built: Built, seed: int, is_loaded: Callable[[str], bool]) -> Built:
    mark_splits(built)
    initialise(built, seed, is_loaded)
    return built
