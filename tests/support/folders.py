"""Hugging Face folders of tiny models, made by transformers' own classes and with random numbers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

OWN_KEYS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 6}}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """No parameter at a special value: norms near one, everything else of a size that shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and "weight" in name
            parameter.copy_(1 + 0.2 * noise if is_norm else 0.1 * noise)


def language_folder(folder: Path, family: str, seed: int = 0, **sizes: Any) -> Any:
    """A language model saved by transformers; returns it, in evaluation mode."""
    config_class, model_class = FAMILIES[family]
    given = {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 256,
        **OWN_KEYS.get(family, {}),
        **sizes,
    }
    model = model_class(config_class(**given)).float().eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    return model


def siglip_folder(folder: Path, seed: int = 0, **sizes: Any) -> Any:
    """A SigLIP saved by transformers, with the pooling head that NVLM has no use for; returns it, in evaluation mode."""
    model = SiglipVisionModel(SiglipVisionConfig(**sizes)).float().eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    return model


def vision_folder(folder: Path, is_6b: bool, seed: int = 0, **sizes: Any) -> Any:
    """An InternViT in the release's names, its numbers those of transformers' form of it, which is returned."""
    config = InternVLVisionConfig(
        norm_type="rms_norm" if is_6b else "layer_norm", use_qk_norm=is_6b, attention_bias=not is_6b, **sizes
    )
    config._attn_implementation = "eager"
    model = InternVLVisionModel(config).float().eval()
    randomise(model, seed)
    folder.mkdir(parents=True)
    save_file(release_names(model.state_dict()), folder / "model.safetensors")
    side = sizes["image_size"][0]
    described = {
        "model_type": "intern_vit_6b",
        "norm_type": config.norm_type,
        "qk_normalization": is_6b,
        "qkv_bias": not is_6b,
        "image_size": side,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
        **{key: sizes[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    }
    (folder / "config.json").write_text(json.dumps(described))
    return model


_LAYER_NAMES = {
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
}
_OUTER_NAMES = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "encoder.layer.": "encoder.layers.",
}


def release_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of an InternViT -> the release's, queries, keys and values in one tensor."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for theirs, ours in {**_OUTER_NAMES, **_LAYER_NAMES}.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor.clone()
    for query in [name for name in renamed if ".q_proj." in name]:
        parts = [renamed.pop(query.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        renamed[query.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return renamed
