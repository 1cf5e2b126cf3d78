"""From the sections of a run to what the training loop works with."""

import logging
from functools import partial
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_nvlm.data.loading.loader import DataConfig, MicroBatchLoader
from megatron_nvlm.data.loading.shared_decoding import SharingLoader, TileShare
from megatron_nvlm.models.build import ModelConfig
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import DTYPES, Device
from megatron_nvlm.parallel.collectives import gather_found
from megatron_nvlm.parallel.vision_ahead import share_index
from megatron_nvlm.runs.components import OpenedData, make_chunks
from megatron_nvlm.training.faults import STOP_FILE
from megatron_nvlm.training.loop import Trainer, TrainingConfig
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.trainable import RecipeConfig, describe, freeze
from megatron_nvlm.training.step import wrap_model

logger = logging.getLogger(__name__)


def make_trainer(
    model: ModelConfig,
    parallelism: ParallelismConfig,
    stage: RecipeConfig,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    data: DataConfig,
    parts: OpenedData,
    save_every_steps: int,
    device: Device,
) -> Trainer:
    """Build, freeze, wrap. Process groups must be there."""
    bare = make_chunks(model, parallelism, training.precision, device.torch_device, training.seed)
    trainable = stage.trainable_components()
    freeze(bare, trainable)
    _report(bare, trainable, parallelism)
    wrapped = wrap_model(bare, parallelism.use_distributed_optimizer)
    built_optimizer, scheduler = build_optimizer(
        optimizer, wrapped, training.train_steps, DTYPES[training.precision], parallelism.use_distributed_optimizer
    )
    for chunk in bare:
        chunk.config.grad_scale_func = built_optimizer.scale_loss
        chunk.payload_tokens = payload_tokens(parallelism, training.micro_batch_size, data.sequence_length)
    shares_tiles = parallelism.vision_placement == "replicated"
    loader_class = partial(SharingLoader, tile_share(device)) if shares_tiles else MicroBatchLoader
    loader = loader_class(
        parts.sets,
        parts.order,
        parts.pipeline,
        training.micro_batch_size,
        training.global_batch_size,
        (parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()),
        parallelism.token_multiple,
        with_pixels=bare.pre_process or shares_tiles,
        num_workers=data.num_workers,
        packing=data.packing,
        prefetch_samples=data.prefetch_samples,
        pin_memory=device.torch_device.type == "cuda",
        cache=data.cache,
    )
    return Trainer(
        config=training,
        device=device.torch_device,
        model=wrapped,
        bare_model=bare,
        optimizer=built_optimizer,
        scheduler=scheduler,
        loader=loader,
        data=data,
        save_every_steps=save_every_steps,
    )


def tile_share(device: Device) -> TileShare:
    """This rank's among the ranks of its model replica."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    number = share_index(parallel_state.get_tensor_model_parallel_rank(), stage, stages)
    ranks = stages * parallel_state.get_tensor_model_parallel_world_size()
    return TileShare(number, ranks, partial(gather_found, device=device.torch_device))


def payload_tokens(parallelism: ParallelismConfig, micro_batch_size: int, sequence_length: int) -> int:
    """Rows of every message between virtual pipeline stages; 0 where messages are as long as their micro-batch."""
    if parallelism.virtual_pipeline_model_parallel_size == 1:
        return 0
    multiple = parallelism.token_multiple
    rows = micro_batch_size * sequence_length
    # Decoder tokens and context tokens are each padded to a multiple (pack), and the context has at least one.
    return -(-rows // multiple) * multiple + -(-max(parallelism.payload_vision_tokens, 1) // multiple) * multiple


def _report(model: ModelChunks, trainable: tuple[str, ...], parallelism: ParallelismConfig) -> None:
    """Say what trains, once per pipeline stage."""
    if parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_data_parallel_rank():
        return
    stage = parallel_state.get_pipeline_model_parallel_rank()
    stages = parallelism.pipeline_model_parallel_size
    where = f"stage {stage + 1} of {stages}: " if stages > 1 else ""
    for line in describe(model, trainable):
        print(f"{where}{line}", flush=True)


def prepare_run_dir(run_dir: Path, resolved: str) -> None:
    """Create the run's folder, write its resolved configuration, forget an old request to stop; every rank calls it."""
    if dist.get_rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(resolved)
        (run_dir / STOP_FILE).unlink(missing_ok=True)
    dist.barrier()
