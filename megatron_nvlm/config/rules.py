"""What must hold between sections of a run, checked before any work: one function per rule."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_nvlm.checkpoint.integrity import VERIFY_CHOICES
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.data.prepare import TOO_LONG
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import check_background
from megatron_nvlm.image.tile_tags import TAG_FORMATS
from megatron_nvlm.image.tiling import candidate_grids
from megatron_nvlm.models.backends import BACKENDS, TE_DTYPES
from megatron_nvlm.models.config import ModelConfig, ResolvedModel, check_model
from megatron_nvlm.models.precision import find_precision
from megatron_nvlm.parallel.device import DEVICES
from megatron_nvlm.text.conversation import TEMPLATES
from megatron_nvlm.text.tokenizer import Tokenizer
from megatron_nvlm.trackers.config import check_trackers
from megatron_nvlm.training.optimizer import check_components, check_optimizer
from megatron_nvlm.training.profiling import check_profile
from megatron_nvlm.training.skipped_updates import check_stability


def model_can_be_built(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Presets exist and the split divides them."""
    check_model(model, run.parallelism)
    if run.model.backend not in BACKENDS:
        raise UserError(f"model.backend is {run.model.backend!r}; choose one of {', '.join(BACKENDS)}")


def tiles_fit_the_encoder(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Tiles have the size that the vision model's positions are made for."""
    size = model.vision.tile_size
    if run.tiling.tile_size != size:
        raise UserError(
            f"tiling.tile_size is {run.tiling.tile_size} and {run.model.vision} encodes tiles of {size}; "
            f"set tiling.tile_size={size}"
        )
    candidate_grids(run.tiling.max_tiles)
    check_background(run.tiling.background)
    if run.tiling.tag_format not in TAG_FORMATS:
        raise UserError(f"tiling.tag_format is {run.tiling.tag_format!r}; choose one of {', '.join(TAG_FORMATS)}")


def batches_divide(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """The global batch is a whole number of micro-batches on every replica."""
    replicas = run.parallelism.data_parallel_size(world_size)
    micro, whole = run.training.micro_batch_size, run.training.global_batch_size
    if micro < 1 or whole < 1 or whole % (micro * replicas):
        raise UserError(
            f"training.global_batch_size {whole} is no multiple of training.micro_batch_size {micro} x "
            f"{replicas} data-parallel ranks"
        )


def virtual_stages_are_possible(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Interleaved stages take micro-batches in groups of a pipeline, and send messages of one length."""
    split = run.parallelism
    if split.virtual_pipeline_model_parallel_size == 1:
        return
    replicas = split.data_parallel_size(world_size)
    micro_batches = run.training.global_batch_size // (run.training.micro_batch_size * replicas)
    if micro_batches % split.pipeline_model_parallel_size:
        raise UserError(
            f"parallelism.virtual_pipeline_model_parallel_size needs micro-batches in groups of the "
            f"{split.pipeline_model_parallel_size} pipeline stages, and a step has {micro_batches} (global_batch_size / "
            "micro_batch_size / data-parallel ranks); change training.global_batch_size"
        )
    if model.variant.needs_cross_attention and not split.payload_vision_tokens:
        raise UserError(
            f"parallelism.payload_vision_tokens is 0 and NVLM-{run.model.variant.upper()} sends vision tokens between "
            "virtual pipeline stages; set it to the most that a micro-batch has in its context"
        )


def samples_fit_the_decoder(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Samples are no longer than the decoder's rotary positions."""
    if run.data.sequence_length > run.model.max_sequence_length:
        raise UserError(
            f"data.sequence_length {run.data.sequence_length} is over model.max_sequence_length "
            f"{run.model.max_sequence_length}"
        )


def names_are_known(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Recipe, precision, device and template exist."""
    run.trainable_components()
    find_precision(run.training.precision)
    if run.training.device not in DEVICES:
        raise UserError(f"training.device is {run.training.device!r}; choose one of {', '.join(DEVICES)}")
    if run.checkpoint.verify not in VERIFY_CHOICES:
        raise UserError(f"checkpoint.verify is {run.checkpoint.verify!r}; choose one of {', '.join(VERIFY_CHOICES)}")
    if run.data.template not in TEMPLATES:
        raise UserError(f"data.template is {run.data.template!r}; choose one of {', '.join(TEMPLATES)}")


def backend_has_the_precision(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Transformer Engine's kernels compute on GPUs alone, those of attention in bfloat16 and float16 alone."""
    if run.model.backend == "te" and run.training.device == "cpu":
        raise UserError(
            "model.backend is te and training.device is cpu; set model.backend=local, or training.device=cuda"
        )
    precision = find_precision(run.training.precision)
    if run.model.backend == "te" and precision.parameter_dtype not in TE_DTYPES:
        raise UserError(
            f"model.backend is te and training.precision is {precision.name}, in which Transformer Engine has no kernel "
            "of attention; set training.precision=bf16, or model.backend=local"
        )


def length_is_given_once(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """A run has a number of steps or of epochs."""
    steps, epochs = run.training.train_steps, run.training.epochs
    if (steps is None) == (epochs is None):
        raise UserError(
            f"training.train_steps is {_null(steps)} and training.epochs is {_null(epochs)}; give one of them, and null "
            "for the other"
        )
    if epochs is not None and not 0 < epochs < math.inf:
        raise UserError(f"training.epochs is {epochs}; it must be a number above 0")


def _null(value: object) -> object:
    return "null" if value is None else value


def counts_are_positive(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Numbers that count steps, files or seconds are at least 1."""
    for name, count in (
        ("training.train_steps", 1 if run.training.train_steps is None else run.training.train_steps),
        ("checkpoint.save_every_steps", run.checkpoint.save_every_steps),
        ("checkpoint.keep_last", run.checkpoint.keep_last),
        (
            "checkpoint.keep_every_steps",
            1 if run.checkpoint.keep_every_steps is None else run.checkpoint.keep_every_steps,
        ),
        ("logging.log_every_steps", run.logging.log_every_steps),
        ("data.sequence_length", run.data.sequence_length),
        ("training.timeout_seconds", run.training.timeout_seconds),
        ("training.start_timeout_seconds", run.training.start_timeout_seconds),
        ("training.save_timeout_seconds", run.training.save_timeout_seconds),
        ("data.shuffle_window_shards", run.data.shuffle_window_shards),
        ("data.prefetch_samples", run.data.prefetch_samples),
        ("data.packing.window_samples", run.data.packing.window_samples),
    ):
        if count < 1:
            raise UserError(f"{name} is {count}; it must be at least 1")


def packs_are_micro_batches(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """With packing, a micro-batch is one pack."""
    if run.data.packing.enabled and run.training.micro_batch_size != 1:
        raise UserError(
            f"with data.packing.enabled a micro-batch is one pack; set training.micro_batch_size=1, not "
            f"{run.training.micro_batch_size}, and let training.global_batch_size count packs"
        )


def something_trains(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """The recipe names a component that this variant has."""
    trainable = run.trainable_components()
    if set(trainable) == {"cross_attention"} and not model.variant.needs_cross_attention:
        raise UserError(
            f"recipe.trainable is {list(trainable)} and NVLM-{model.variant.name.upper()} has no "
            "cross-attention, so nothing would train; name vision_projection, language_model or vision_model"
        )


def shares_are_possible(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Shares lie between their bounds, and the loader's limits are valid."""
    if not 0 <= run.data.max_bad_fraction <= 1:
        raise UserError(f"data.max_bad_fraction is {run.data.max_bad_fraction}; it must lie between 0 and 1")
    if not 0 < run.model.init_std < math.inf:
        raise UserError(f"model.init_std is {run.model.init_std}; it must be above 0, since with 0 nothing is learned")
    if run.data.too_long not in TOO_LONG:
        raise UserError(f"data.too_long is {run.data.too_long!r}; choose one of {', '.join(TOO_LONG)}")
    for name, share in (
        ("model.hidden_dropout", run.model.hidden_dropout),
        ("model.attention_dropout", run.model.attention_dropout),
    ):
        if not 0 <= share < 1:
            raise UserError(f"{name} is {share}; it must be at least 0 and below 1")
    for name, value in (("data.num_workers", run.data.num_workers), ("data.cache.retries", run.data.cache.retries)):
        if value < 0:
            raise UserError(f"{name} is {value}; it must be at least 0")
    if run.data.cache.limit_gb <= 0:
        raise UserError(f"data.cache.limit_gb is {run.data.cache.limit_gb}; it must be above 0")


def weights_come_from_one_place(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """A new run starts from one thing."""
    folders = [
        name for name in ("weights", "language_weights", "vision_weights") if getattr(run.model, name) is not None
    ]
    if folders and run.checkpoint.initial_weights is not None:
        raise UserError(
            f"model.{folders[0]} and checkpoint.initial_weights both say what a new run starts with; keep one of them"
        )


def validation_is_possible(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Sets have names of their own, and numbers lie in their ranges."""
    validation = run.validation
    labels = [one.label for one in validation.sets]
    for number, (one, label) in enumerate(zip(validation.sets, labels, strict=True)):
        if not label:
            raise UserError(f"validation.sets.{number} has the path {one.path!r}, which gives no name; give it a name")
        if label in labels[:number]:
            raise UserError(
                f"validation.sets has the name {label!r} twice (entries {labels.index(label)} and {number}); give one "
                "of them another name"
            )
        if one.samples is not None and one.samples < 1:
            raise UserError(
                f"validation.sets.{number}.samples ({label}) is {one.samples}; it must be at least 1, or null for "
                "validation.samples"
            )
    if validation.samples is not None and validation.samples < 1:
        raise UserError(
            f"validation.samples is {validation.samples}; it must be at least 1, or null for whole sets; for no "
            "validation leave validation.sets empty"
        )
    if validation.every_steps < 1:
        raise UserError(f"validation.every_steps is {validation.every_steps}; it must be at least 1")
    if not 0 <= validation.text_margin < math.inf:
        raise UserError(f"validation.text_margin is {validation.text_margin}; it must be 0 or a positive number")


def schedule_is_possible(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Learning rates and steps make a schedule."""
    check_optimizer(run.optimizer, run.training.train_steps)
    absent = set() if model.variant.needs_cross_attention else {"cross_attention"}
    check_components(run.optimizer, set(run.trainable_components()) - absent)


def _dropouts(model: ModelConfig) -> tuple[float, ...]:
    return model.hidden_dropout, model.attention_dropout, model.lora.dropout if model.lora.rank else 0.0


def updates_can_be_judged(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Limits of section `stability` are possible."""
    check_stability(run.stability)
    if run.logging.straggler_steps < 0:
        raise UserError(f"logging.straggler_steps is {run.logging.straggler_steps}; it must be 0 for none, or more")


def steps_can_be_measured(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """The peak that was given is one, and steps and ranks to profile are there."""
    peak = run.logging.peak_tflops
    if peak is not None and not 0 < peak < math.inf:
        raise UserError(f"logging.peak_tflops is {peak}; it must be above 0, or null to take it from the table of GPUs")
    training = run.training
    check_profile(training.profile, training.profile_ranks, world_size, training.train_steps)


def trackers_are_named(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Trackers have names that they can take."""
    check_trackers(run.logging.wandb, run.logging.mlflow)


def numbers_are_finite(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """No number of the run file, wherever it stands, is NaN or infinite."""

    def check(value: object, key: str) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} is {value}; it must be a finite number")
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, part in parts:
            check(part, f"{key}.{name}" if key else str(name))

    check(dataclasses.asdict(run), "")


def _splits_the_model(run: RunConfig) -> bool:
    return run.parallelism.tensor_model_parallel_size * run.parallelism.pipeline_model_parallel_size > 1


# What no test proves (docs/parallelism.md): (what is asked for, whether a run asks for it, why it is refused).
NOT_PROVEN: tuple[tuple[str, Callable[[RunConfig, ResolvedModel], bool], str], ...] = (
    (
        "parallelism.context_parallel_size over 1",
        lambda run, model: run.parallelism.context_parallel_size != 1,
        "the interval masks of a ragged row are not spread over ranks; set it to 1 and raise tensor_model_parallel_size",
    ),
    (
        "parallelism.expert_model_parallel_size over 1",
        lambda run, model: run.parallelism.expert_model_parallel_size != 1,
        "no language model among the presets has experts; set it to 1",
    ),
    (
        "dropout with tensor or pipeline parallelism",
        lambda run, model: _splits_the_model(run) and max(_dropouts(run.model)) > 0,
        "each layout would drop other elements, so it cannot be compared with one process; set model.hidden_dropout, "
        "model.attention_dropout and model.lora.dropout to 0",
    ),
    (
        "a language model with tied embeddings in a pipeline with the distributed optimizer",
        lambda run, model: (
            run.parallelism.pipeline_model_parallel_size > 1
            and run.parallelism.use_distributed_optimizer
            and model.language.tied_embeddings
        ),
        "Megatron-core then splits its gradient buffers into several buckets, and no test compares such a run with one "
        "process; set parallelism.use_distributed_optimizer=false or parallelism.pipeline_model_parallel_size=1",
    ),
)


def layout_is_proven(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Nothing is asked for that the tests of layouts do not cover."""
    for what, is_asked, reason in NOT_PROVEN:
        if is_asked(run, model):
            raise UserError(f"{what} is refused: {reason}")


RULES: tuple[Callable[[RunConfig, ResolvedModel, int], None], ...] = (
    layout_is_proven,
    model_can_be_built,
    tiles_fit_the_encoder,
    batches_divide,
    virtual_stages_are_possible,
    samples_fit_the_decoder,
    names_are_known,
    backend_has_the_precision,
    length_is_given_once,
    counts_are_positive,
    packs_are_micro_batches,
    something_trains,
    shares_are_possible,
    weights_come_from_one_place,
    validation_is_possible,
    schedule_is_possible,
    updates_can_be_judged,
    steps_can_be_measured,
    trackers_are_named,
    numbers_are_finite,  # last: rules that name a key's bounds say more
)


def check_run(run: RunConfig, model: ResolvedModel, world_size: int) -> None:
    """Apply every rule; the first that fails raises UserError."""
    for rule in RULES:
        rule(run, model, world_size)


def check_files(run: RunConfig) -> None:
    """The files that the run names are there (shards are opened and checked by data/shards/read.py)."""
    if not Path(run.data.tokenizer).is_file():
        raise UserError(f"there is no tokenizer at {run.data.tokenizer}; set data.tokenizer to a tokenizer.json")


def check_data(run: RunConfig, model: ResolvedModel, tokenizer: Tokenizer, sets: Sequence[ShardSet]) -> None:
    """Tokenizer and shards fit the run."""
    if tokenizer.vocab_size > model.language.vocab_size:
        raise UserError(
            f"the tokenizer {run.data.tokenizer} has {tokenizer.vocab_size} ids and {run.model.language} embeds "
            f"{model.language.vocab_size}; use the tokenizer of that language model"
        )
    for name in TEMPLATES[run.data.template].special_tokens:
        tokenizer.special_id(name)
    if not sets:
        raise UserError("data.train names no shards; add a path and a weight")
    check_sets(run, sets)


def check_sets(run: RunConfig, sets: Sequence[ShardSet]) -> None:
    """Tiles that were cut in advance were cut as the run cuts them."""
    for shards in sets:
        tile_size = shards.index.settings.get("tile_size", run.tiling.tile_size)
        if tile_size != run.tiling.tile_size:
            raise UserError(
                f"the shards in {shards.folder} hold tiles of {tile_size} pixels and tiling.tile_size is "
                f"{run.tiling.tile_size}; build them with that size"
            )
        background = shards.index.settings.get("background")
        if shards.index.settings.get("images") == "tiles" and background != run.tiling.background:
            raise UserError(
                f"the tiles in {shards.folder} were cut with background {background or 'null'} and tiling.background is "
                f"{run.tiling.background or 'null'}; build them with --background, or set tiling.background to theirs"
            )
