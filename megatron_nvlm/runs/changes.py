"""What a run file changes in a run that goes on: listed by key, refused by name, or allowed by name."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.models.config import ResolvedModel

_CROSS_ATTENTION = "model.cross_attention."
SCHEDULE_KEYS = frozenset(
    f"optimizer.{name}"
    for name in (
        *("max_lr", "min_lr", "warmup_steps", "decay_steps"),
        *("adam_beta1", "adam_beta2", "adam_eps", "weight_decay"),
    )
)
"""What checkpoint.keep_schedule keeps; `clip_grad` is of no state and follows the file."""
NEW_WEIGHT_KEYS = frozenset(
    ("model.init_std", f"{_CROSS_ATTENTION}gate_init", "model.weights", "model.language_weights")
) | {"model.vision_weights", "checkpoint.initial_weights"}
"""Keys that only a new run reads."""


def settings_of(config: RunConfig, model: ResolvedModel) -> dict[str, Any]:
    """Every key of a run with its value in force: where null means another key's value, that value."""
    settings: dict[str, Any] = {}
    _flatten(dataclasses.asdict(config), "", settings)
    settings["optimizer.decay_steps"] = config.optimizer.decay_steps or config.training.train_steps
    settings["recipe.trainable"] = sorted(config.recipe.trainable_components())
    cross, language = config.model.cross_attention, model.language
    if model.variant.needs_cross_attention:
        settings[f"{_CROSS_ATTENTION}offset"] = cross.interval - 1 if cross.offset is None else cross.offset
        settings[f"{_CROSS_ATTENTION}num_attention_heads"] = cross.num_attention_heads or language.num_attention_heads
        settings[f"{_CROSS_ATTENTION}num_query_groups"] = cross.num_query_groups or language.num_query_groups
    else:
        settings = {key: value for key, value in settings.items() if not key.startswith(_CROSS_ATTENTION)}
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # as a checkpoint gives them back
    return plain


def _flatten(section: Mapping[str, Any], prefix: str, settings: dict[str, Any]) -> None:
    for name, value in section.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{name}.", settings)
        else:
            settings[f"{prefix}{name}"] = value


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose value has changed, with the old and the new value; keys that only one side has are of another version."""
    return {key: (before[key], value) for key, value in now.items() if key in before and before[key] != value}


def no_effect(key: str) -> str:
    """In brackets, why a changed key does nothing in a run that goes on; nothing for keys that take effect."""
    return " (of new weights alone, so without effect here)" if key in NEW_WEIGHT_KEYS else ""
