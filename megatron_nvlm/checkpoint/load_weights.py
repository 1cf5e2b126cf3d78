"""Whole weights into a rank's part of the model, cut by the table of models/sharding.py."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.initialise import named_parameters, split_of
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.sharding import cut


@torch.no_grad()
def load_weights(model: NVLMModel, weights: Mapping[str, Tensor], keep: tuple[str, ...] = ()) -> None:
    """Set this stage's parameters from whole tensors under our names.

    Args:
        keep: prefixes of parameters that may stay as they are (new modules that the weights do not know).

    Raises:
        UserError: a parameter has no weight, or one of another shape.
    """
    group = model.language_model.pg_collection.tp
    for name, parameter in named_parameters(model):
        if name not in weights:
            if any(prefix in name for prefix in keep):
                continue
            raise UserError(f"the weights have nothing for {name}; is this another model or variant?")
        part = cut(weights[name], split_of(name, model), group.rank(), group.size())
        if part.shape != parameter.shape:
            raise UserError(
                f"{name} is {list(parameter.shape)} here and {list(part.shape)} in the weights; is this another model?"
            )
        parameter.copy_(part)
