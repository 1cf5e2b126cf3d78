"""What a run file changes in a run that goes on: each key takes effect, is refused by name, or is said to have no effect."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.data.fingerprint import PACKED_KEYS
from megatron_nvlm.dotted_keys import dotted_keys
from megatron_nvlm.errors import UserError
from megatron_nvlm.models.config import ResolvedModel

_CROSS_ATTENTION = "model.cross_attention."
_LORA = "model.lora."
LORA_RANK = f"{_LORA}rank"
COMPONENT_LR = "optimizer.component_lr"
_ADDED_LATER: dict[str, Any] = {"training.epochs": None, "training.device": "auto", COMPONENT_LR: {}, LORA_RANK: 0}
"""Keys that checkpoints of earlier versions do not say, and what their runs did."""
PERMISSION = "checkpoint.allow_changes"


class Effect(Enum):
    """What becomes of a key that was changed since the checkpoint."""

    FOLLOWED = auto()
    """The new value is in force. Models and tokenizers are compared by what they are (`check_identity`), not by name."""
    SCHEDULE = auto()
    """The new value is in force, unless checkpoint.keep_schedule keeps the checkpoint's."""
    NEW_WEIGHTS = auto()
    """Only new weights read it, so it does nothing in a run that goes on."""
    SHAPES = auto()
    """Decides shapes and places of the weights."""
    STATE = auto()
    """Decides the form of the optimizer's state."""
    MEANING = auto()
    """Decides what the weights were trained to read."""
    TRAINING = auto()
    """Decides the form of the text, or of the numbers, in which the run is trained."""
    ORDER = auto()
    """Decides which sample comes when, as `data_fingerprint` says: refused unless allowed; then the order begins again."""


@dataclass(frozen=True)
class Refusal:
    """Why a changed key of some effect is refused, and when."""

    why: str
    can_be_allowed: bool
    """By name, in checkpoint.allow_changes."""
    of_weights: bool
    """Whether it also holds where only weights are loaded: to begin another run with, or to answer."""


REFUSALS = {
    Effect.SHAPES: Refusal("the weights have the shapes of the former", can_be_allowed=False, of_weights=True),
    Effect.STATE: Refusal("the optimizer's state has the form of the former", can_be_allowed=False, of_weights=False),
    Effect.MEANING: Refusal("the weights were trained with the former", can_be_allowed=True, of_weights=True),
    Effect.TRAINING: Refusal("the run was trained with the former", can_be_allowed=True, of_weights=False),
}


def _keys(section: str, names: str) -> list[str]:
    return [f"{section}{name}" for name in names.split()]


EFFECTS: dict[str, Effect] = {
    key: effect
    for effect, keys in {
        Effect.FOLLOWED: [
            "run_dir",
            *_keys("model.", "variant language vision backend attention_dropout hidden_dropout recompute"),
            *_keys("model.", "max_sequence_length lora.dropout"),
            *_keys("tiling.", "max_tiles"),
            *_keys(
                "data.",
                "tokenizer sequence_length too_long valid system num_workers prefetch_samples max_bad_fraction ledger",
            ),
            *_keys("data.cache.", "folder limit_gb retries"),
            *_keys("optimizer.", "clip_grad"),
            *_keys("training.", "micro_batch_size global_batch_size train_steps epochs device"),
            *_keys("training.", "timeout_seconds start_timeout_seconds save_timeout_seconds profile profile_ranks"),
            *_keys("parallelism.", "tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel"),
            *_keys("parallelism.", "virtual_pipeline_model_parallel_size pipeline_layout payload_vision_tokens"),
            *_keys("parallelism.", "context_parallel_size expert_model_parallel_size"),
            *_keys("parallelism.", "vision_placement vision_tiles_at_once"),
            *_keys("recipe.", "name trainable"),
            *_keys("checkpoint.", "save_every_steps keep_last keep_every_steps asynchronous verify"),
            *_keys("checkpoint.", "keep_schedule allow_changes"),
            *_keys("logging.", "log_every_steps tensorboard rank_files straggler_steps peak_tflops"),
            *_keys("stability.", "max_skipped window_steps grad_norm_spike loss_spike"),
            *_keys("logging.wandb.", "project name mode"),
            *_keys("logging.mlflow.", "uri experiment"),
            *_keys("validation.", "sets every_steps samples text_margin"),
        ],
        Effect.SCHEDULE: _keys(
            "optimizer.",
            "max_lr min_lr warmup_steps decay_steps adam_beta1 adam_beta2 adam_eps weight_decay "
            "schedule wsd_decay_steps wsd_decay_style component_lr",
        ),
        Effect.NEW_WEIGHTS: [
            *_keys("model.", "init_std weights language_weights vision_weights"),
            f"{_CROSS_ATTENTION}gate_init",
            "training.seed",
            "checkpoint.initial_weights",
        ],
        Effect.SHAPES: [
            *_keys(_CROSS_ATTENTION, "interval offset num_attention_heads num_query_groups qk_norm"),
            *_keys(_LORA, "rank targets"),
            "tiling.tile_size",
        ],
        Effect.STATE: ["parallelism.use_distributed_optimizer"],
        Effect.MEANING: [*_keys("tiling.", "tag_format thumbnail_tag background"), f"{_LORA}alpha"],
        Effect.TRAINING: ["data.template", "training.precision"],
        Effect.ORDER: [
            *_keys("data.", "train seed shuffle_window_shards"),
            *_keys("data.packing.", "enabled window_samples"),
        ],
    }.items()
    for key in keys
}
"""Of every key of a run file."""


def settings_of(config: RunConfig, model: ResolvedModel) -> dict[str, Any]:
    """Every key of a run with its value in force: where null means another key's value, that value.

    A run whose steps have been counted (runs/length.py) has both `training.train_steps` and `training.epochs`.
    """
    settings = dict(dotted_keys(dataclasses.asdict(config)))
    # Names of sets came later than checkpoints that are still there; none is no change to them.
    settings["data.train"] = [
        {key: value for key, value in source.items() if value is not None} for source in settings["data.train"]
    ]
    settings["optimizer.decay_steps"] = config.optimizer.decay_steps or config.training.train_steps
    settings = {key: value for key, value in settings.items() if not key.startswith(f"{COMPONENT_LR}.")}
    settings[COMPONENT_LR] = config.optimizer.multiples
    settings["recipe.trainable"] = sorted(config.trainable_components())
    if config.model.lora.rank:
        settings[f"{_LORA}targets"] = sorted(config.model.lora.targets)
    else:
        settings = {key: value for key, value in settings.items() if key == LORA_RANK or not key.startswith(_LORA)}
    cross, language = config.model.cross_attention, model.language
    if model.variant.needs_cross_attention:
        settings[f"{_CROSS_ATTENTION}offset"] = cross.interval - 1 if cross.offset is None else cross.offset
        settings[f"{_CROSS_ATTENTION}num_attention_heads"] = cross.num_attention_heads or language.num_attention_heads
        settings[f"{_CROSS_ATTENTION}num_query_groups"] = cross.num_query_groups or language.num_query_groups
    else:
        settings = {key: value for key, value in settings.items() if not key.startswith(_CROSS_ATTENTION)}
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # as a checkpoint gives them back
    return plain


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose value has changed, with the old and the new value; keys that only one side has are of another version."""
    before = {**_ADDED_LATER, **before} if before else before
    return {key: (before[key], value) for key, value in now.items() if key in before and before[key] != value}


def refuse_changes(
    path: Path, changed: Mapping[str, tuple[Any, Any]], allowed: Iterable[str], goes_on: bool = False
) -> None:
    """Raise UserError if a key was changed that a checkpoint rests on, unless it is allowed by name.

    Args:
        allowed: `checkpoint.allow_changes`.
        goes_on: whether the run goes on with the optimizer's state; else weights alone are loaded.
    """
    check_permissions(allowed)
    for key, (old, new) in changed.items():
        refusal = REFUSALS.get(EFFECTS[key])
        if refusal is None or not (refusal.of_weights or goes_on) or (refusal.can_be_allowed and key in allowed):
            continue
        permission = f"; {PERMISSION}=[{key}] goes on with the new value" if refusal.can_be_allowed else ""
        raise UserError(
            f"{key} was {json.dumps(old)} when the checkpoint {path} was written and is now {json.dumps(new)}, and "
            f"{refusal.why}; set it back, or choose another run_dir for a new run{permission}"
        )
    old, new = changed.get("recipe.trainable", ((), ()))
    added = sorted(set(new) - set(old))
    if goes_on and added:
        raise UserError(
            f"recipe lets {', '.join(added)} train, for which the checkpoint {path} has no optimizer state; set it back, or "
            f"begin a new run with these weights: another run_dir and checkpoint.initial_weights={path.parent.parent}"
        )


def check_permissions(allowed: Iterable[str]) -> None:
    """Raise UserError for a key in `checkpoint.allow_changes` that needs no permission, or for which there is none."""
    permitted = {Effect.ORDER, *(effect for effect, refusal in REFUSALS.items() if refusal.can_be_allowed)}
    can_be_allowed = sorted({*PACKED_KEYS, *(key for key, effect in EFFECTS.items() if effect in permitted)})
    for key in allowed:
        if key not in can_be_allowed:
            raise UserError(f"{PERMISSION} names {key}; what it can allow is {', '.join(can_be_allowed)}")


def order_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys by which the order of samples is another one; none if the checkpoint does not say what its order was.

    Args:
        before, now: as of `data_fingerprint`.
    """
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)) if before else []


def refuse_other_order(path: Path, changed: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise UserError if the order of samples is another one by a key that is not allowed by name."""
    refused = [key for key in changed if key not in allowed]
    if refused:
        which = (
            "; data.train stands for the sets' samples too, as after another build" if "data.train" in refused else ""
        )
        raise UserError(
            f"{', '.join(refused)} give another order of samples than the checkpoint {path} was trained in{which}; set "
            f"this back, or go on from the beginning of the new order with {PERMISSION}=[{','.join(refused)}]"
        )


def describe_effect(key: str, keep_schedule: bool) -> str:
    """What becomes of a changed key, in brackets; nothing for one that simply takes effect."""
    effect = EFFECTS[key]
    if effect is Effect.NEW_WEIGHTS:
        return " (of new weights alone, so without effect here)"
    if effect is Effect.SCHEDULE and keep_schedule:
        return " (kept at the old value by checkpoint.keep_schedule)"
    return f" (allowed by {PERMISSION})" if effect in REFUSALS else ""
