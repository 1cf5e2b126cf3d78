"""Weights into a rank's part of the model, cut by the table of models/sharding.py."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_nvlm.checkpoint.tensor_source import TensorSource
from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.open_folders import FolderWeights
from megatron_nvlm.models.chunks import ModelChunks, chunks_of
from megatron_nvlm.models.initialise import named_parameters, split_of
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.sharding import Split, cut
from megatron_nvlm.models.weight_rows import Row


@torch.no_grad()
def load_weights(model: NVLMModel | ModelChunks, weights: Mapping[str, Tensor]) -> None:
    """Set this stage's parameters from whole tensors under our names.

    Raises:
        UserError: a parameter has no weight, or one of another shape.
    """
    rank, ranks = _place(model)
    for name, parameter in named_parameters(model):
        if name not in weights:
            raise UserError(f"the weights have nothing for {name}; is this another model or variant?")
        _set(name, parameter, cut(weights[name], split_of(name, model), rank, ranks))


@torch.no_grad()
def load_folder_weights(model: NVLMModel | ModelChunks, weights: FolderWeights) -> None:
    """Set the parameters that folders have weights for; others stay as they are (new modules).

    Each rank touches the pages of its own slices only, where the transform allows it: not for the encoder's heads, which
    are stored by query, key and value.
    """
    rank, ranks = _place(model)
    for name, parameter in named_parameters(model):
        if name in weights.rows:
            part = read_part(weights.rows[name], weights.theirs, split_of(name, model), rank, ranks)
            _set(name, parameter, part)


def read_part(row: Row, theirs: TensorSource, split: Split | None, rank: int, ranks: int) -> Tensor:
    """What a tensor-parallel rank holds of one parameter."""
    tensors = [theirs.read(name) for name in row.theirs]
    of_part = row.transform.for_part(ranks)
    if split is None or split.padding is not None or of_part is None:
        return cut(row.transform.to_ours(tensors), split, rank, ranks)
    return of_part.to_ours([tensor.chunk(ranks, split.dim)[rank] for tensor in tensors])


def _place(model: NVLMModel | ModelChunks) -> tuple[int, int]:
    group = chunks_of(model)[0].language_model.pg_collection.tp
    return group.rank(), group.size()


def _set(name: str, parameter: torch.nn.Parameter, part: Tensor) -> None:
    if part.shape != parameter.shape:
        raise UserError(
            f"{name} is {list(parameter.shape)} here and {list(part.shape)} in the weights; is this another model?"
        )
    parameter.copy_(part)
