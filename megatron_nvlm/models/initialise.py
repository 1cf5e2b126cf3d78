"""First values of new weights: a function of the seed and the parameter's name, so that every layout starts alike."""

import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_nvlm.models.chunks import ModelChunks, chunks_of
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.sharding import Split, cut, find_split, full_shape

_LAYER = re.compile(r"^(language_model\.decoder\.layers\.)(\d+)(\..*)$")

ADAPTERS = "lora"
"""The component that low-rank adapters of the decoder are."""
EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT_LAYER = "language_model.output_layer.weight"

# Smaller positions would drown in the patches beside them: an encoder trained from scratch then cannot tell places apart.
_UNIT_DEVIATION = ("vision_model.class_token", "vision_model.position_embeddings.weight")


def named_parameters(model: NVLMModel | ModelChunks) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with the names of the whole model: decoder layers counted over all pipeline stages.

    The last stage's copy of a tied embedding has the embedding's name.
    """
    for chunk in chunks_of(model):
        stage = chunk.language_model.pg_collection.pp.rank()
        offset = get_transformer_layer_offset(chunk.config, chunk.language_model.vp_stage, stage)
        for name, parameter in chunk.named_parameters():
            if name == OUTPUT_LAYER and chunk.share_embeddings_and_output_weights:
                name = EMBEDDING
            match = _LAYER.match(name)
            yield (f"{match[1]}{int(match[2]) + offset}{match[3]}" if match else name), parameter


def split_of(name: str, model: NVLMModel | ModelChunks) -> Split | None:
    """How this model splits the parameter of that name over its tensor-parallel ranks."""
    first = chunks_of(model)[0]
    return find_split(name, first.vision_heads, first.vocabulary)


def _tensor_group(model: NVLMModel | ModelChunks) -> torch.distributed.ProcessGroup:
    return chunks_of(model)[0].language_model.pg_collection.tp


def mark_splits(model: NVLMModel | ModelChunks) -> None:
    """Tell core which parameters are split: its gradient norm counts whole ones once and split ones on every rank."""
    for name, parameter in named_parameters(model):
        split = split_of(name, model)
        parameter.tensor_model_parallel = split is not None  # type: ignore[attr-defined]
        parameter.partition_dim = -1 if split is None else split.dim  # type: ignore[attr-defined]
        parameter.partition_stride = 1 if split is None else split.blocks  # type: ignore[attr-defined]


@torch.no_grad()
def initialise(
    model: NVLMModel | ModelChunks, seed: int, is_loaded: Callable[[str], bool] = lambda name: False
) -> None:
    """Set every weight of this rank's stage; gates, norms and layer-scales keep what their modules start with.

    Weights are normal with the configuration's `init_std`, those that write to the residual stream divided by
    sqrt(2 * layers) (Megatron's rule); the encoder's positions and class token have a deviation of 1, as in InternViT's
    own code; biases are zero.

    Args:
        is_loaded: whether a weight of that name is loaded afterwards. It is zero then, since numbers for a large model take
            minutes to draw.
    """
    group = _tensor_group(model)
    ranks, rank = group.size(), group.rank()
    spread = Spread(model.config.init_method_std, model.config.num_layers)
    for name, parameter in named_parameters(model):
        if keeps_first_value(name):
            continue
        if is_loaded(name):
            parameter.zero_()
            continue
        split = split_of(name, model)
        full = new_weight(name, full_shape(parameter.shape, split, ranks), spread, seed)
        parameter.copy_(cut(full, split, rank, ranks))


@dataclass(frozen=True)
class Spread:
    """How far new weights spread: their standard deviation, and the layers that those of the residual stream share."""

    std: float
    num_layers: int


def keeps_first_value(name: str) -> bool:
    """Whether a parameter keeps what its module gives it: gates, norms and layer-scales."""
    return name.rsplit(".", 1)[-1] in ("gate", "scale") or "norm" in name


def new_weight(name: str, shape: list[int], spread: Spread, seed: int) -> torch.Tensor:
    """The first value of a whole parameter that does not keep its module's."""
    if name.endswith((".bias", ".lora_b")):
        return torch.zeros(shape)
    # A generator per parameter: what one stage or layout draws does not shift what another one gets.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if name.endswith(".lora_a"):  # PEFT's rule; with the other matrix at zero a new adapter changes nothing
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])
    full = torch.randn(shape, generator=generator)
    writes_residual = "linear_proj" in name or ("linear_fc2" in name and not name.startswith("vision_projection"))
    residual_std = spread.std / math.sqrt(2 * spread.num_layers)
    return full * (residual_std if writes_residual else 1.0 if name in _UNIT_DEVIATION else spread.std)


def count_parameters(model: NVLMModel | ModelChunks) -> dict[str, int]:
    """Parameters of the whole model by part, from this rank's stage (tensor-parallel parts counted together)."""
    ranks = _tensor_group(model).size()
    counts: dict[str, int] = {}
    for name, parameter in named_parameters(model):
        part = component_of(name)
        counts[part] = counts.get(part, 0) + math.prod(full_shape(parameter.shape, split_of(name, model), ranks))
    return counts


def component_of(name: str) -> str:
    """vision_model, vision_projection, cross_attention, language_model or lora: the units that recipes freeze and train."""
    if ".adapters." in name:
        return ADAPTERS
    if ".cross_attention." in name or ".cross_attn_bda." in name or ".pre_cross_attn_layernorm." in name:
        return "cross_attention"
    return name.split(".", 1)[0]
