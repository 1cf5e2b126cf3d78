"""Megatron-core's configurations of decoder, encoder and projector, from sizes and settings."""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_nvlm.models.config import RECOMPUTE, ModelConfig
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.families.languages import family_of
from megatron_nvlm.models.families.vision_family import VisionPreset
from megatron_nvlm.models.families.visions import vision_family_of
from megatron_nvlm.models.padding import pad_evenly
from megatron_nvlm.models.parallelism import ParallelismConfig

# Two settings of core that give wrong numbers without an error over gloo, which matches messages in order: batched
# messages between two interleaved stages go both ways to one peer, and an overlapped send may read a freed output.
SAFE_COMMUNICATION: dict[str, Any] = dict(batch_p2p_comm=False, overlap_p2p_comm=False)


def gelu_by_tanh(x: Tensor) -> Tensor:
    """GELU in its approximation by tanh."""
    return torch.nn.functional.gelu(x, approximate="tanh")


# Names of Hugging Face -> functions.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": gelu_by_tanh,
}


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
        kv_channels=preset.head_size,
        softmax_scale=_softmax_scale(preset),
        normalization="RMSNorm",
        layernorm_epsilon=preset.layernorm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=family_of(preset).qkv_bias,
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
        activation_func=ACTIVATIONS[vision_family_of(preset).activation],
        attention_dropout=0.0,
        hidden_dropout=0.0,
        hetereogenous_dist_checkpoint=True,
        **_common(config, dtype, on_cpu),
    )


def projector_config(
    config: ModelConfig, preset: LanguagePreset, parallelism: ParallelismConfig, dtype: torch.dtype, on_cpu: bool
) -> TransformerConfig:
    """The projector's configuration: tensor parallel, without sequence parallelism (its tokens are vision tokens)."""
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


def _softmax_scale(preset: LanguagePreset) -> float | None:
    """Scale of self-attention's scores; None for 1 / sqrt(head size).

    YaRN multiplies cosine and sine, so all scores of a head by the square.
    """
    if preset.rope_scaling is None or preset.rope_scaling.attention_scale == 1:
        return None
    return preset.rope_scaling.attention_scale**2 / math.sqrt(preset.head_size)


def _virtual_size(parallelism: ParallelismConfig) -> int | None:
    """Number of chunks as core spells it: None without interleaving."""
    chunks = parallelism.virtual_pipeline_model_parallel_size
    return chunks if chunks > 1 else None
