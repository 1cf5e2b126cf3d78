"""From the sections of a run to what the loop works with. Users' mistakes end here, before work begins."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_nvlm.checkpoint.save_load import Identity
from megatron_nvlm.data.loader import DataConfig, MicroBatchLoader
from megatron_nvlm.data.order import BlendedOrder
from megatron_nvlm.data.shards import ShardSet
from megatron_nvlm.data.stages import SamplePipeline
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.models.build import ModelConfig, build_model, find_parts
from megatron_nvlm.models.initialise import initialise, mark_splits
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.partition import PartitionConfig
from megatron_nvlm.parallel.device import DTYPES, Device
from megatron_nvlm.parallel.groups import get_groups, get_single_rank_groups
from megatron_nvlm.text.tokenizer import Tokenizer
from megatron_nvlm.training.loop import Trainer, TrainingConfig
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.stages import StageConfig, describe, freeze
from megatron_nvlm.training.step import wrap_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataParts:
    """Opened data: everything that can be wrong with it has been looked for."""

    sets: list[ShardSet]
    order: BlendedOrder
    pipeline: SamplePipeline


def open_data(data: DataConfig, tiling: TilingConfig, model: ModelConfig) -> DataParts:
    """Open shards and tokenizer; needs no process groups."""
    parts = find_parts(model)
    tokenizer = Tokenizer.load(data.tokenizer)
    if tokenizer.vocab_size > parts.language.vocab_size:
        raise UserError(
            f"the tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids and {model.language} embeds "
            f"{parts.language.vocab_size}; use the tokenizer of that language model"
        )
    if not data.train:
        raise UserError("data.train names no shards; add a path and a weight")
    sets = [ShardSet(source.path) for source in data.train]
    for shards in sets:
        tile_size = shards.index["settings"].get("tile_size", tiling.tile_size)
        if tile_size != tiling.tile_size:
            raise UserError(
                f"the shards in {shards.folder} hold tiles of {tile_size} pixels and tiling.tile_size is "
                f"{tiling.tile_size}; build them with that size"
            )
    order = BlendedOrder([len(shards) for shards in sets], [source.weight for source in data.train], data.seed)
    return DataParts(sets, order, make_pipeline(data, tiling, model, tokenizer))


def make_pipeline(data: DataConfig, tiling: TilingConfig, model: ModelConfig, tokenizer: Tokenizer) -> SamplePipeline:
    """The arrows from stored samples to rows, for this model."""
    parts = find_parts(model)
    return SamplePipeline(
        tokenizer=tokenizer,
        tiling=tiling,
        variant=parts.variant,
        tokens_per_tile=parts.vision.tokens_per_tile,
        sequence_length=data.sequence_length,
        template=data.template,
        system=data.system,
    )


def make_identity(model: ModelConfig, tokenizer: Tokenizer) -> Identity:
    """What a checkpoint of this run is of."""
    return Identity(model.variant, model.language, model.vision, tokenizer.fingerprint)


def make_model(
    model: ModelConfig, partition: PartitionConfig, precision: str, device: torch.device, seed: int
) -> NVLMModel:
    """This rank's stage with new weights."""
    built = build_model(model, partition, get_groups(), get_single_rank_groups(), DTYPES[precision], device)
    mark_splits(built)
    initialise(built, seed)
    return built


def make_trainer(
    model: ModelConfig,
    partition: PartitionConfig,
    stage: StageConfig,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    data: DataConfig,
    parts: DataParts,
    save_every_steps: int,
    device: Device,
) -> Trainer:
    """Build, freeze, wrap. Process groups must be there."""
    bare = make_model(model, partition, training.precision, device.torch_device, training.seed)
    trainable = stage.trainable_parts()
    freeze(bare, trainable)
    _report(bare, trainable, partition)
    wrapped = wrap_model(bare, partition.use_distributed_optimizer)
    built_optimizer, scheduler = build_optimizer(
        optimizer, wrapped, training.train_steps, DTYPES[training.precision], partition.use_distributed_optimizer
    )
    bare.config.grad_scale_func = built_optimizer.scale_loss
    loader = MicroBatchLoader(
        parts.sets,
        parts.order,
        parts.pipeline,
        training.micro_batch_size,
        training.global_batch_size,
        (parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()),
        partition.row_multiple,
        with_pixels=bare.pre_process,
        num_workers=data.num_workers,
    )
    return Trainer(
        config=training,
        device=device.torch_device,
        model=wrapped,
        bare_model=bare,
        optimizer=built_optimizer,
        scheduler=scheduler,
        loader=loader,
        max_bad_fraction=data.max_bad_fraction,
        save_every_steps=save_every_steps,
    )


def _report(model: NVLMModel, trainable: tuple[str, ...], partition: PartitionConfig) -> None:
    """Say what trains, once per pipeline stage."""
    if parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_data_parallel_rank():
        return
    stage = parallel_state.get_pipeline_model_parallel_rank()
    stages = partition.pipeline_model_parallel_size
    where = f"stage {stage + 1} of {stages}: " if stages > 1 else ""
    for line in describe(model, trainable):
        print(f"{where}{line}", flush=True)


def prepare_run_dir(run_dir: Path, resolved: str) -> None:
    """Create the run's folder and write its resolved configuration; every rank calls it."""
    if dist.get_rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(resolved)
    dist.barrier()
