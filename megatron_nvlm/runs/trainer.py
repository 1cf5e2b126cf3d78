"""Builds what the training loop works with from a resolved run."""

import logging
from collections.abc import Callable
from functools import partial

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_nvlm.accounting.flops import sizes_of
from megatron_nvlm.data.loading.builder import BatchSettings, ListedData, OpenedData
from megatron_nvlm.data.loading.loader import Loader, MicroBatchLoader
from megatron_nvlm.data.loading.shared_decoding import SharingLoader, TileShare
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.parallel.collectives import gather_found
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.parallel.ranges import CoreRanges
from megatron_nvlm.parallel.vision_ahead import share_index
from megatron_nvlm.runs.components import make_chunks
from megatron_nvlm.runs.entry import say
from megatron_nvlm.runs.resolve import ResolvedRun
from megatron_nvlm.training.accounting import Accounting
from megatron_nvlm.training.loop import Trainer
from megatron_nvlm.training.optimizer import build_optimizer
from megatron_nvlm.training.step import wrap_model
from megatron_nvlm.training.trainable import describe, freeze
from megatron_nvlm.training.validation import StartLosses, Validator

logger = logging.getLogger(__name__)


def make_trainer(
    run: ResolvedRun,
    data: OpenedData,
    device: Device,
    validation: ListedData | None = None,
    is_loaded: Callable[[str], bool] = lambda name: False,
) -> Trainer:
    """Build, freeze, wrap. Process groups must be there.

    Args:
        is_loaded: whether a weight of that name is loaded afterwards, and need not be drawn.
    """
    config = run.config
    distributed = config.parallelism.use_distributed_optimizer
    bare = make_chunks(
        run.model, config.parallelism, run.precision, device.torch_device, config.training.seed, is_loaded
    )
    freeze(bare, run.trainable)
    _report(bare, run)
    wrapped = wrap_model(bare, run.precision, distributed)
    optimizer, scheduler = build_optimizer(config.optimizer, wrapped, run.train_steps, run.precision, distributed)
    ranges = CoreRanges()
    for chunk in bare:
        chunk.config.grad_scale_func = optimizer.scale_loss
        chunk.payload_tokens = run.payload_tokens
        chunk.config.timers = ranges
    return Trainer(
        config=config.training,
        train_steps=run.train_steps,
        device=device.torch_device,
        model=wrapped,
        bare_model=bare,
        optimizer=optimizer,
        rates=config.optimizer,
        scheduler=scheduler,
        loader=make_loader(run, data, device, has_first_layer=bare.pre_process),
        data=config.data,
        save_every_steps=config.checkpoint.save_every_steps,
        accounting=make_accounting(run, device),
        validator=make_validator(run, validation, device, wrapped, bare) if validation is not None else None,
    )


def make_accounting(run: ResolvedRun, device: Device) -> Accounting:
    """What counts the operations of a step; its peak is said once."""
    accounting = Accounting(
        sizes_of(run.model, run.config.parallelism),
        run.trainable,
        device.torch_device,
        run.world_size,
        run.config.logging.peak_tflops,
    )
    say(accounting.describe())
    return accounting


def make_validator(
    run: ResolvedRun,
    data: ListedData,
    device: Device,
    wrapped: list[DistributedDataParallel],
    bare: ModelChunks,
) -> Validator:
    """What measures the losses of `validation.sets`."""
    return Validator(
        config=run.config.validation,
        data=data,
        models=wrapped,
        device=device.torch_device,
        open_loader=partial(make_loader, run, data, device, has_first_layer=bare.pre_process),
        at_start=StartLosses(run.run_dir.validation_at_start, data),
    )


def make_loader(run: ResolvedRun, data: OpenedData | ListedData, device: Device, has_first_layer: bool) -> Loader:
    """This rank's loader; only a rank that encodes tiles keeps their pixels."""
    config = run.config
    shares_tiles = config.parallelism.vision_placement == "replicated"
    size, batch_size = config.training.micro_batch_size, config.training.global_batch_size
    batch = BatchSettings(
        size,
        data.plan.micro_batches_per_step * size if isinstance(data, ListedData) else batch_size,
        (parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()),
        run.token_multiple,
        with_pixels=has_first_layer or shares_tiles,
        pin_memory=device.torch_device.type == "cuda",
    )
    if shares_tiles:
        return SharingLoader(tile_share(device), data, batch, config.data)
    return MicroBatchLoader(data, batch, config.data)


def tile_share(device: Device) -> TileShare:
    """This rank's among the ranks of its model replica."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    index = share_index(parallel_state.get_tensor_model_parallel_rank(), stage, stages)
    ranks = stages * parallel_state.get_tensor_model_parallel_world_size()
    return TileShare(index, ranks, partial(gather_found, device=device.torch_device))


def _report(model: ModelChunks, run: ResolvedRun) -> None:
    """Say what trains, once per pipeline stage."""
    if parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_data_parallel_rank():
        return
    stage = parallel_state.get_pipeline_model_parallel_rank()
    stages = run.config.parallelism.pipeline_model_parallel_size
    where = f"stage {stage + 1} of {stages}: " if stages > 1 else ""
    for line in describe(model, run.trainable):
        print(f"{where}{line}", flush=True)
