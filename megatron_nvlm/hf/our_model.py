"""The real model without memory: what a conversion's other side must be."""

import torch
import torch.distributed as dist

from megatron_nvlm.hf.convert import OurModel, describe_model
from megatron_nvlm.models.build import build_model
from megatron_nvlm.models.config import ResolvedModel
from megatron_nvlm.models.initialise import mark_splits, named_parameters
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import get_groups, get_single_rank_groups, start_groups


def describe_our_model(model: ResolvedModel) -> OurModel:
    """Names and shapes of all parameters, from the model that training builds."""
    if not dist.is_initialized():
        start_groups(ParallelismConfig(), use_device(), seed=1)
    built = build_model(
        model, ParallelismConfig(), get_groups(), get_single_rank_groups(), torch.float32, torch.device("meta")
    )
    mark_splits(built)
    shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(built)}
    return describe_model(shapes)
