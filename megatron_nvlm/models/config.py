"""Section `model` of a run, and what it names: sizes and the declaration of the variant."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.families.language_json import language_preset_of
from megatron_nvlm.models.families.languages import LANGUAGE_PRESETS
from megatron_nvlm.models.families.presets import Preset, find_preset
from megatron_nvlm.models.families.vision_family import VisionPreset
from megatron_nvlm.models.families.visions import VISION_PRESETS, vision_preset_of
from megatron_nvlm.models.lora import LoraConfig, check_lora
from megatron_nvlm.models.parallelism import ParallelismConfig, check_parallelism
from megatron_nvlm.sequence.variants import VARIANTS, Variant

logger = logging.getLogger(__name__)

FOLDER_PREFIX = "hf:"
"""Before the path of a Hugging Face folder, where a name of a preset may stand as well."""

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}


@dataclass(frozen=True)
class ModelConfig:
    """Section `model` of a run."""

    variant: str
    """d, x or h."""
    language: str
    """A name of LANGUAGE_PRESETS, or hf:PATH, a Hugging Face folder whose config.json gives the sizes."""
    vision: str
    """A name of VISION_PRESETS, or hf:PATH."""
    backend: str = "local"
    """local (PyTorch, CPU or GPU) or te (Transformer Engine, GPU)."""
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    init_std: float = 0.02
    """Standard deviation of new weights (the release's scripts: 0.014)."""
    recompute: str = "none"
    """Activations computed again in the backward pass: none, selective (core attention), full (each layer)."""
    max_sequence_length: int = 4096
    """Longest sample in decoder tokens."""
    weights: str | None = None
    """Hugging Face folder of a whole NVLM that a new run starts with; null for new weights."""
    language_weights: str | None = None
    """Hugging Face folder of the language model that a new run starts with."""
    vision_weights: str | None = None
    """Hugging Face folder of the vision model that a new run starts with."""


@dataclass(frozen=True)
class ResolvedModel:
    """A ModelConfig, and the presets and declarations that it names."""

    config: ModelConfig
    variant: Variant
    language: LanguagePreset
    vision: VisionPreset


def resolve_model(config: ModelConfig) -> ResolvedModel:
    """Look up what the configuration names; UserError names the nearest choices."""
    if config.variant not in VARIANTS:
        raise UserError(f"model.variant is {config.variant!r}; choose one of {', '.join(VARIANTS)}")
    if config.recompute not in RECOMPUTE:
        raise UserError(f"model.recompute is {config.recompute!r}; choose one of {', '.join(RECOMPUTE)}")
    return ResolvedModel(
        config,
        VARIANTS[config.variant],
        _find_sizes(LANGUAGE_PRESETS, config.language, "model.language", language_preset_of),
        _find_sizes(VISION_PRESETS, config.vision, "model.vision", vision_preset_of),
    )


def _find_sizes(presets: dict[str, Preset], name: str, key: str, read: Callable[[Path], Preset]) -> Preset:
    """Sizes of a preset, or read from a folder: `hf:PATH`, or a path with a slash."""
    if name.startswith(FOLDER_PREFIX):
        return read(Path(name.removeprefix(FOLDER_PREFIX)))
    if name in presets or not Path(name).is_dir():
        return find_preset(presets, name, key)
    if "/" not in name:
        logger.warning(
            "%s: %r is read as a folder; write %s%s, since later a plain name means a preset only",
            key,
            name,
            FOLDER_PREFIX,
            name,
        )
    return read(Path(name))


def check_model(model: ResolvedModel, parallelism: ParallelismConfig) -> None:
    """Refuse a model or a split that cannot be built, before anything is."""
    config, parts = model.config, model
    check_lora(config.lora)
    cross = config.cross_attention
    if parts.variant.needs_cross_attention and not cross.layers(parts.language.num_layers):
        raise UserError(
            f"model.cross_attention.interval {cross.interval} gives no cross-attention layer among the "
            f"{parts.language.num_layers} of {config.language}; NVLM-{config.variant.upper()} needs at least one"
        )
    check_parallelism(
        parallelism,
        parts.language,
        parts.vision,
        cross.num_attention_heads or parts.language.num_attention_heads,
        cross.num_query_groups or parts.language.num_query_groups,
    )
