"""The layers as Megatron-core specs: a decoder layer, an encoder layer, a projector. They read like the paper's figure 3."""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_nvlm.models.backends import Backend, without_bias
from megatron_nvlm.models.cross_attention import CrossAttentionConfig, GroupedQueryCrossAttention, TanhGatedAdd
from megatron_nvlm.models.families.vision_family import VisionPreset
from megatron_nvlm.models.families.visions import vision_family_of
from megatron_nvlm.models.head_norm import HeadNormSelfAttention
from megatron_nvlm.models.lora import LoraConfig, with_adapters
from megatron_nvlm.models.vision_model import FullWidthNormSelfAttention, LayerScaleAdd


def norm_of(backend: Backend, normalization: str) -> type:
    """The backend's RMSNorm or LayerNorm."""
    return backend.rms_norm if normalization == "RMSNorm" else backend.layer_norm


def get_mlp_spec(backend: Backend, lora: LoraConfig | None = None) -> ModuleSpec:
    """Two linear layers with the activation of the configuration between them."""
    lora = lora or LoraConfig()
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=with_adapters(backend.column_parallel_linear, "linear_fc1", lora),
            linear_fc2=with_adapters(backend.row_parallel_linear, "linear_fc2", lora),
        ),
    )


def get_decoder_layer_spec(
    backend: Backend,
    cross_attention: CrossAttentionConfig | None = None,
    query_key_norm: bool = False,
    lora: LoraConfig | None = None,
) -> ModuleSpec:
    """Self-attention -> [gated cross-attention] -> MLP; each adds to the residual stream.

    Without `cross_attention` it is a plain language-model layer: names and numbers of what is there do not change.

    Args:
        query_key_norm: whether self-attention has an RMSNorm of each head of queries and keys.
        lora: adapters of self-attention and MLP; cross-attention has none, since it trains itself.
    """
    lora = lora or LoraConfig()
    head_norm = backend.rms_norm if query_key_norm else None
    slots: dict[str, Any] = dict(
        input_layernorm=backend.rms_norm,
        self_attention=ModuleSpec(
            module=HeadNormSelfAttention if query_key_norm else SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=with_adapters(backend.column_parallel_linear, "linear_qkv", lora),
                core_attention=backend.core_attention,
                linear_proj=with_adapters(backend.row_parallel_linear, "linear_proj", lora),
                q_layernorm=head_norm,
                k_layernorm=head_norm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=backend.rms_norm,
        mlp=get_mlp_spec(backend, lora),
        mlp_bda=get_bias_dropout_add,
    )
    if cross_attention is not None:
        slots |= dict(
            pre_cross_attn_layernorm=backend.rms_norm,
            cross_attention=ModuleSpec(
                module=GroupedQueryCrossAttention,
                params={
                    "cross_attention": cross_attention,
                    "qk_norm": backend.rms_norm if cross_attention.qk_norm else None,
                },
                submodules=CrossAttentionSubmodules(
                    linear_q=backend.column_parallel_linear,
                    linear_kv=backend.column_parallel_linear,
                    core_attention=backend.interval_attention,
                    linear_proj=backend.row_parallel_linear,
                ),
            ),
            cross_attn_bda=ModuleSpec(module=TanhGatedAdd, params={"gate_init": cross_attention.gate_init}),
        )
    return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**slots))


def get_vision_layer_spec(backend: Backend, config: TransformerConfig, preset: VisionPreset) -> ModuleSpec:
    """A pre-norm encoder layer, with layer-scales where the family has them.

    InternViT-6B also normalises queries and keys over the full width.
    """
    norm = norm_of(backend, config.normalization)
    add: Any = get_bias_dropout_add
    if vision_family_of(preset).has_layer_scale:
        scale = {"hidden_size": config.hidden_size, "dtype": config.params_dtype, "init": preset.layer_scale_init}
        add = ModuleSpec(module=LayerScaleAdd, params=scale)
    column = backend.column_parallel_linear
    submodules = SelfAttentionSubmodules(
        # add_bias_linear covers the whole layer; the 6B family has biases everywhere but in QKV.
        linear_qkv=column if config.add_qkv_bias else without_bias(column),
        core_attention=backend.core_attention,
        linear_proj=backend.row_parallel_linear,
    )
    params: dict[str, Any] = {"attn_mask_type": AttnMaskType.no_mask}
    if preset.qk_norm:
        attention = ModuleSpec(FullWidthNormSelfAttention, params={**params, "qk_norm": norm}, submodules=submodules)
    else:
        attention = ModuleSpec(SelfAttention, params=params, submodules=submodules)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_spec(backend),
            mlp_bda=add,
        ),
    )
