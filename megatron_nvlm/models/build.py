"""Builds this rank's part of the model from a resolved configuration. The only place that writes TransformerConfigs."""

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_nvlm.models.backends import Backend, get_backend
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.models.config import ModelConfig, ResolvedModel
from megatron_nvlm.models.core_config import language_config, projector_config, vision_config
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.families.languages import family_of
from megatron_nvlm.models.families.vision_family import VisionPreset
from megatron_nvlm.models.gradient_marks import SUM_OVER_MODEL_PARALLEL, SUM_OVER_TENSOR_PARALLEL
from megatron_nvlm.models.language_model import LanguageModel
from megatron_nvlm.models.layer_specs import get_decoder_layer_spec, get_vision_layer_spec, norm_of
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.padding import Padding, pad_evenly
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.projector import LinearProjector, MLPProjector
from megatron_nvlm.models.vision_model import Holder, VisionModel


def build_model(
    model: ResolvedModel,
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
    config, backend = model.config, get_backend(model.config.backend)
    on_cpu = device.type != "cuda"
    stages, stage = groups.pp.size(), groups.pp.rank()
    first = stage == 0 and not vp_stage
    last = stage == stages - 1 and vp_stage in (None, parallelism.virtual_pipeline_model_parallel_size - 1)
    language = language_config(config, model.language, parallelism, dtype, on_cpu)
    vocabulary = vocabulary_padding(model.language, parallelism)
    with torch.device(device):
        language_model = LanguageModel(
            language,
            _decoder_layers(model, language, backend, stage, vp_stage),
            vocab_size=vocabulary.padded if vocabulary else model.language.vocab_size,
            max_sequence_length=config.max_sequence_length,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=model.language.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=model.language.rotary_base,
            scatter_embedding_sequence_parallel=False,  # vision tokens are put in before the tokens are scattered
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        scale_rotary(language_model, model.language)
        vision_model = vision_projection = None
        if first or (parallelism.vision_placement == "replicated" and not vp_stage):
            vision_model = build_vision(config, model.vision, parallelism, groups, single_rank_groups, dtype, on_cpu)
        if first:
            projector = projector_config(config, model.language, parallelism, dtype, on_cpu)
            vision_projection = _PROJECTORS[model.variant.projector](projector, backend, model.vision.shuffled_size)
    return NVLMModel(
        language_model,
        vision_model,
        vision_projection,
        model.variant.needs_cross_attention,
        vision_heads(model.vision, parallelism),
        parallelism.vision_tiles_at_once,
        parallelism.vision_placement == "replicated",
        vocabulary,
    )


def scale_rotary(language_model: LanguageModel, preset: LanguagePreset) -> None:
    """Set the frequencies of a scaled rotary embedding; core has Llama's with fixed settings, and no YaRN for this form."""
    if preset.rope_scaling is not None:
        rotary = language_model.rotary_pos_emb
        rotary.inv_freq = preset.rope_scaling.apply(rotary.inv_freq, preset.rotary_base)


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
    model: ResolvedModel,
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
        build_model(model, parallelism, groups, single_rank_groups, dtype, device, number) for number in numbers
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
    model: ResolvedModel,
    language: TransformerConfig,
    backend: Backend,
    stage: int,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    first_layer = get_transformer_layer_offset(language, vp_stage, stage)
    with_cross_attention = (
        model.config.cross_attention.layers(language.num_layers) if model.variant.needs_cross_attention else frozenset()
    )
    specs = [
        get_decoder_layer_spec(
            backend,
            model.config.cross_attention if layer in with_cross_attention else None,
            family_of(model.language).query_key_norm,
            model.config.lora,
        )
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
) -> VisionModel:
    """This rank's encoder, or its part of one."""
    heads, backend = vision_heads(preset, parallelism), get_backend(config.backend)
    own_groups = single_rank_groups
    if heads is not None:
        alone = single_rank_groups
        own_groups = ProcessGroupCollection(tp=groups.tp, cp=alone.cp, pp=alone.pp, dp=alone.dp, dp_cp=alone.dp_cp)
    vision = vision_config(config, preset, dtype, on_cpu, 1 if heads is None else groups.tp.size())
    layers = [get_vision_layer_spec(backend, vision, preset)] * preset.num_layers
    return VisionModel(
        vision,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_of(backend, preset.normalization)),
        preset,
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
