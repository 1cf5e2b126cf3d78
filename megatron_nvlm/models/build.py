"""From a run's configuration to this rank's part of the model. The only place that writes TransformerConfigs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.backends import Backend, get_backend
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.families.folder_sizes import language_preset_of, vision_preset_of
from megatron_nvlm.models.families.sizes import (
    LANGUAGE_PRESETS,
    VISION_PRESETS,
    LanguagePreset,
    Preset,
    VisionPreset,
    find_preset,
)
from megatron_nvlm.models.gradient_marks import SUM_OVER_MODEL_PARALLEL, SUM_OVER_TENSOR_PARALLEL
from megatron_nvlm.models.intern_vit import Holder, InternViTModel
from megatron_nvlm.models.layer_specs import get_decoder_layer_spec, get_vision_layer_spec
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.padding import Padding, pad_evenly
from megatron_nvlm.models.parallelism import ParallelismConfig, check_parallelism
from megatron_nvlm.models.projector import LinearProjector, MLPProjector
from megatron_nvlm.sequence.variants import VARIANTS, Variant

# Two settings of core that give wrong numbers without an error over gloo, which matches messages in order: batched
# messages between two interleaved stages go both ways to one peer, and an overlapped send may read a freed output.
SAFE_COMMUNICATION: dict[str, Any] = dict(batch_p2p_comm=False, overlap_p2p_comm=False)

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
    """A name of LANGUAGE_PRESETS, or a Hugging Face folder whose config.json gives the sizes."""
    vision: str
    """A name of VISION_PRESETS, or a Hugging Face folder whose config.json gives the sizes."""
    backend: str = "local"
    """local (PyTorch, CPU or GPU) or te (Transformer Engine, GPU)."""
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
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
    """Of a preset, or read from the folder of that name."""
    return read(Path(name)) if Path(name).is_dir() else find_preset(presets, name, key)


def check_model(model: ResolvedModel, parallelism: ParallelismConfig) -> None:
    """Refuse a model or a split that cannot be built, before anything is."""
    config, parts = model.config, model
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


def language_config(
    config: ModelConfig, preset: LanguagePreset, parallelism: ParallelismConfig, dtype: torch.dtype, on_cpu: bool
) -> TransformerConfig:
    """The decoder's configuration. Cross-attention stands on some layers only, so checkpoints are keyed by layer."""
    return TransformerConfig(
        num_layers=preset.num_layers,
        hidden_size=preset.hidden_size,
        ffn_hidden_size=preset.ffn_hidden_size,
        num_attention_heads=preset.num_attention_heads,
        num_query_groups=preset.num_query_groups,
        normalization="RMSNorm",
        layernorm_epsilon=preset.layernorm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=preset.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
        tensor_model_parallel_size=parallelism.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallelism.pipeline_model_parallel_size,
        sequence_parallel=parallelism.sequence_parallel,
        virtual_pipeline_model_parallel_size=_virtual_size(parallelism),
        pipeline_model_parallel_layout=parallelism.pipeline_layout,
        # Messages as long as the micro-batch. Interleaved stages have one length (core cannot agree on others there).
        variable_seq_lengths=parallelism.pipeline_model_parallel_size > 1 and _virtual_size(parallelism) is None,
        moe_token_dispatcher_type="alltoall",  # core asks for it beside variable_seq_lengths, also without experts
        calculate_per_token_loss=True,
        hetereogenous_dist_checkpoint=True,
        **_common(config, dtype, on_cpu),
        **RECOMPUTE[config.recompute],
    )


def vision_config(
    config: ModelConfig, preset: VisionPreset, dtype: torch.dtype, on_cpu: bool, tensor_parallel: int = 1
) -> TransformerConfig:
    """The encoder's configuration, without dropout (paper: InternViT as released).

    Args:
        tensor_parallel: ranks that share each layer; 1 where each rank holds the encoder whole.
    """
    return TransformerConfig(
        num_layers=preset.num_layers,
        hidden_size=preset.hidden_size,
        ffn_hidden_size=preset.ffn_hidden_size,
        num_attention_heads=pad_evenly(preset.num_attention_heads, tensor_parallel).padded,
        kv_channels=preset.hidden_size // preset.num_attention_heads,
        tensor_model_parallel_size=tensor_parallel,
        normalization=preset.normalization,
        layernorm_epsilon=preset.layernorm_epsilon,
        add_bias_linear=True,
        add_qkv_bias=preset.qkv_bias,
        gated_linear_unit=False,
        activation_func=torch.nn.functional.gelu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        hetereogenous_dist_checkpoint=True,
        **_common(config, dtype, on_cpu),
    )


def projector_config(
    config: ModelConfig, preset: LanguagePreset, parallelism: ParallelismConfig, dtype: torch.dtype, on_cpu: bool
) -> TransformerConfig:
    """The projector's configuration: tensor parallel, without sequence parallelism (its rows are vision tokens)."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=preset.hidden_size,
        ffn_hidden_size=preset.ffn_hidden_size,
        num_attention_heads=preset.num_attention_heads,
        add_bias_linear=False,
        gated_linear_unit=False,
        activation_func=torch.nn.functional.gelu,
        tensor_model_parallel_size=parallelism.tensor_model_parallel_size,
        **_common(config, dtype, on_cpu),
    )


def _common(config: ModelConfig, dtype: torch.dtype, on_cpu: bool) -> dict[str, Any]:
    return dict(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        init_method_std=config.init_std,
        perform_initialization=False,  # models/initialise.py gives every layout the same weights
        use_cpu_initialization=on_cpu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=config.backend == "te",
        attention_softmax_in_fp32=True,
        deallocate_pipeline_outputs=True,
        **SAFE_COMMUNICATION,
    )


def _virtual_size(parallelism: ParallelismConfig) -> int | None:
    """Core's spelling of the number of chunks: None without interleaving."""
    chunks = parallelism.virtual_pipeline_model_parallel_size
    return chunks if chunks > 1 else None


def build_model(
    config: ModelConfig,
    parallelism: ParallelismConfig,
    groups: ProcessGroupCollection,
    single_rank_groups: ProcessGroupCollection,
    dtype: torch.dtype,
    device: torch.device,
    vp_stage: int | None = None,
) -> NVLMModel:
    """This rank's stage of the model, weights not yet set (see models/initialise.py and checkpoint/).

    Args:
        groups: this rank's process groups. single_rank_groups: groups that hold this rank alone.
        device: where parameters live; `meta` allocates nothing.
        vp_stage: which of the stage's chunks, if it has several (`build_chunks` makes them all).
    """
    parts, backend = resolve_model(config), get_backend(config.backend)
    on_cpu = device.type != "cuda"
    stages, stage = groups.pp.size(), groups.pp.rank()
    first = stage == 0 and not vp_stage
    last = stage == stages - 1 and vp_stage in (None, parallelism.virtual_pipeline_model_parallel_size - 1)
    language = language_config(config, parts.language, parallelism, dtype, on_cpu)
    vocabulary = vocabulary_padding(parts.language, parallelism)
    with torch.device(device):
        language_model = GPTModel(
            language,
            _decoder_layers(config, parts, language, backend, stage, vp_stage),
            vocab_size=vocabulary.padded if vocabulary else parts.language.vocab_size,
            max_sequence_length=config.max_sequence_length,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=parts.language.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=parts.language.rotary_base,
            scatter_embedding_sequence_parallel=False,  # vision tokens are put in before the rows are scattered
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        vision_model = vision_projection = None
        if first or (parallelism.vision_placement == "replicated" and not vp_stage):
            vision_model = build_vision(config, parts.vision, parallelism, groups, single_rank_groups, dtype, on_cpu)
        if first:
            projector = projector_config(config, parts.language, parallelism, dtype, on_cpu)
            vision_projection = _PROJECTORS[parts.variant.projector](projector, backend, 4 * parts.vision.hidden_size)
    return NVLMModel(
        language_model,
        vision_model,
        vision_projection,
        parts.variant.needs_cross_attention,
        vision_heads(parts.vision, parallelism),
        parallelism.vision_tiles_at_once,
        parallelism.vision_placement == "replicated",
        vocabulary,
    )


def vocabulary_padding(preset: LanguagePreset, parallelism: ParallelismConfig) -> Padding | None:
    """How the rows of the vocabulary are filled up for the tensor-parallel ranks; None where they divide them."""
    ranks = parallelism.tensor_model_parallel_size
    return pad_evenly(preset.vocab_size, ranks) if preset.vocab_size % ranks else None


def vision_heads(preset: VisionPreset, parallelism: ParallelismConfig) -> Padding | None:
    """How the encoder's heads are shared by tensor-parallel ranks; None where each rank holds the encoder whole."""
    if parallelism.vision_placement != "tensor_parallel" or parallelism.tensor_model_parallel_size == 1:
        return None
    return pad_evenly(preset.num_attention_heads, parallelism.tensor_model_parallel_size)


def build_chunks(
    config: ModelConfig,
    parallelism: ParallelismConfig,
    groups: ProcessGroupCollection,
    single_rank_groups: ProcessGroupCollection,
    dtype: torch.dtype,
    device: torch.device,
) -> ModelChunks:
    """All that this rank holds of the model: one chunk, or several under virtual pipeline stages."""
    chunks = parallelism.virtual_pipeline_model_parallel_size
    numbers = range(chunks) if chunks > 1 else [None]
    return ModelChunks(
        build_model(config, parallelism, groups, single_rank_groups, dtype, device, number) for number in numbers
    )


def _mlp_projector(config: TransformerConfig, backend: Backend, input_size: int) -> torch.nn.Module:
    linears = MLPSubmodules(linear_fc1=backend.column_parallel_linear, linear_fc2=backend.row_parallel_linear)
    return MLPProjector(config, linears, backend.layer_norm, input_size)


def _linear_projector(config: TransformerConfig, backend: Backend, input_size: int) -> torch.nn.Module:
    return LinearProjector(config, input_size)


_PROJECTORS: dict[str, Callable[[TransformerConfig, Backend, int], torch.nn.Module]] = {
    "mlp": _mlp_projector,
    "linear": _linear_projector,
}


def _decoder_layers(
    config: ModelConfig,
    parts: ResolvedModel,
    language: TransformerConfig,
    backend: Backend,
    stage: int,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    first_layer = get_transformer_layer_offset(language, vp_stage, stage)
    with_cross_attention = (
        config.cross_attention.layers(language.num_layers) if parts.variant.needs_cross_attention else frozenset()
    )
    specs = [
        get_decoder_layer_spec(backend, config.cross_attention if layer in with_cross_attention else None)
        for layer in range(first_layer, first_layer + get_num_layers_to_build(language, vp_stage, stage))
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=backend.rms_norm)


# Placement -> the mark of the ranks that encode different tiles with copies of the same encoder.
_ENCODE_DIFFERENT_TILES: dict[str, str | None] = {
    "first_stage": SUM_OVER_TENSOR_PARALLEL,
    "replicated": SUM_OVER_MODEL_PARALLEL,
    "tensor_parallel": None,
}


def build_vision(
    config: ModelConfig,
    preset: VisionPreset,
    parallelism: ParallelismConfig,
    groups: ProcessGroupCollection,
    single_rank_groups: ProcessGroupCollection,
    dtype: torch.dtype,
    on_cpu: bool,
) -> InternViTModel:
    """This rank's encoder, or its part of one."""
    heads, backend = vision_heads(preset, parallelism), get_backend(config.backend)
    own_groups = single_rank_groups
    if heads is not None:
        alone = single_rank_groups
        own_groups = ProcessGroupCollection(tp=groups.tp, cp=alone.cp, pp=alone.pp, dp=alone.dp, dp_cp=alone.dp_cp)
    vision = vision_config(config, preset, dtype, on_cpu, 1 if heads is None else groups.tp.size())
    layers = [get_vision_layer_spec(backend, vision, preset)] * preset.num_layers
    return InternViTModel(
        vision,
        TransformerBlockSubmodules(layer_specs=layers),
        preset.tile_size,
        preset.patch_size,
        own_groups,
        Holder(
            heads,
            groups.pp.rank(),
            groups.tp.rank(),
            groups.tp.size(),
            groups.dp_cp.rank(),
            _ENCODE_DIFFERENT_TILES[parallelism.vision_placement],
        ),
    )
