"""What must hold between sections of a run, checked before any work: one function per rule."""

from collections.abc import Callable
from pathlib import Path

from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.tile_tags import TAG_FORMATS
from megatron_nvlm.image.tiling import candidate_grids
from megatron_nvlm.models.backends import BACKENDS
from megatron_nvlm.models.build import check_model, find_parts
from megatron_nvlm.parallel.device import DTYPES
from megatron_nvlm.text.conversation import TEMPLATES
from megatron_nvlm.training.optimizer import check_optimizer


def model_can_be_built(run: RunConfig, world_size: int) -> None:
    """Presets exist and the split divides them."""
    check_model(run.model, run.parallelism)
    if run.model.backend not in BACKENDS:
        raise UserError(f"model.backend is {run.model.backend!r}; choose one of {', '.join(BACKENDS)}")


def tiles_fit_the_encoder(run: RunConfig, world_size: int) -> None:
    """Tiles have the size that the vision model's positions are made for."""
    size = find_parts(run.model).vision.tile_size
    if run.tiling.tile_size != size:
        raise UserError(
            f"tiling.tile_size is {run.tiling.tile_size} and {run.model.vision} encodes tiles of {size}; "
            f"set tiling.tile_size={size}"
        )
    candidate_grids(run.tiling.max_tiles)
    if run.tiling.tag_format not in TAG_FORMATS:
        raise UserError(f"tiling.tag_format is {run.tiling.tag_format!r}; choose one of {', '.join(TAG_FORMATS)}")


def batches_divide(run: RunConfig, world_size: int) -> None:
    """The global batch is a whole number of micro-batches on every replica."""
    replicas = run.parallelism.data_parallel_size(world_size)
    micro, whole = run.training.micro_batch_size, run.training.global_batch_size
    if micro < 1 or whole < 1 or whole % (micro * replicas):
        raise UserError(
            f"training.global_batch_size {whole} is no multiple of training.micro_batch_size {micro} x "
            f"{replicas} data-parallel ranks"
        )


def samples_fit_the_decoder(run: RunConfig, world_size: int) -> None:
    """Samples are no longer than the decoder's rotary positions."""
    if run.data.sequence_length > run.model.max_sequence_length:
        raise UserError(
            f"data.sequence_length {run.data.sequence_length} is over model.max_sequence_length "
            f"{run.model.max_sequence_length}"
        )


def names_are_known(run: RunConfig, world_size: int) -> None:
    """Stage, precision and template exist."""
    run.stage.trainable_parts()
    if run.training.precision not in DTYPES:
        raise UserError(f"training.precision is {run.training.precision!r}; choose one of {', '.join(DTYPES)}")
    if run.data.template not in TEMPLATES:
        raise UserError(f"data.template is {run.data.template!r}; choose one of {', '.join(TEMPLATES)}")


def counts_are_positive(run: RunConfig, world_size: int) -> None:
    """Numbers that count steps or files are at least 1."""
    for name, count in (
        ("training.train_steps", run.training.train_steps),
        ("checkpoint.save_every_steps", run.checkpoint.save_every_steps),
        ("checkpoint.keep_last", run.checkpoint.keep_last),
        ("logging.log_every_steps", run.logging.log_every_steps),
        ("data.sequence_length", run.data.sequence_length),
        ("data.shuffle_window_shards", run.data.shuffle_window_shards),
        ("data.prefetch_samples", run.data.prefetch_samples),
        ("data.packing.window_samples", run.data.packing.window_samples),
    ):
        if count < 1:
            raise UserError(f"{name} is {count}; it must be at least 1")


def packed_rows_are_micro_batches(run: RunConfig, world_size: int) -> None:
    """With packing, a micro-batch is one row."""
    if run.data.packing.enabled and run.training.micro_batch_size != 1:
        raise UserError(
            f"with data.packing.enabled a micro-batch is one packed row; set training.micro_batch_size=1, not "
            f"{run.training.micro_batch_size}, and let training.global_batch_size count rows"
        )


def shares_are_possible(run: RunConfig, world_size: int) -> None:
    """Limits of the loader are such."""
    if not 0 <= run.data.max_bad_fraction <= 1:
        raise UserError(f"data.max_bad_fraction is {run.data.max_bad_fraction}; it must lie between 0 and 1")
    for name, value in (("data.num_workers", run.data.num_workers), ("data.cache.retries", run.data.cache.retries)):
        if value < 0:
            raise UserError(f"{name} is {value}; it must be at least 0")
    if run.data.cache.limit_gb <= 0:
        raise UserError(f"data.cache.limit_gb is {run.data.cache.limit_gb}; it must be above 0")


def schedule_is_possible(run: RunConfig, world_size: int) -> None:
    """Learning rates and steps make a schedule."""
    check_optimizer(run.optimizer, run.training.train_steps)


RULES: tuple[Callable[[RunConfig, int], None], ...] = (
    model_can_be_built,
    tiles_fit_the_encoder,
    batches_divide,
    samples_fit_the_decoder,
    names_are_known,
    counts_are_positive,
    packed_rows_are_micro_batches,
    shares_are_possible,
    schedule_is_possible,
)


def check_run(run: RunConfig, world_size: int) -> None:
    """Apply every rule; the first that fails raises UserError."""
    for rule in RULES:
        rule(run, world_size)


def check_files(run: RunConfig) -> None:
    """The files that the run names are there (shards are opened and checked by data/shards.py)."""
    if not Path(run.data.tokenizer).is_file():
        raise UserError(f"there is no tokenizer at {run.data.tokenizer}; set data.tokenizer to a tokenizer.json")
