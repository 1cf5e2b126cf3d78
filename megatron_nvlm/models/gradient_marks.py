"""Marks on parameters that say what their gradients still need; set by the modules, read by training/step.py."""

from collections.abc import Iterable

from torch.nn import Parameter

SUM_OVER_TENSOR_PARALLEL = "sum_over_tensor_parallel"
"""Each tensor-parallel rank computes a part of the gradient: add them up."""
SUM_OVER_MODEL_PARALLEL = "sum_over_model_parallel"
"""Each rank of the model replica computes a part of the gradient: add them up."""


def mark(parameter: Parameter, name: str) -> None:
    """Set a mark."""
    setattr(parameter, name, True)


def marked(parameters: Iterable[Parameter], name: str) -> list[Parameter]:
    """Trainable parameters that carry a mark, in order."""
    return [parameter for parameter in parameters if parameter.requires_grad and getattr(parameter, name, False)]


def mark_whole_copy(parameter: Parameter, is_first: bool) -> None:
    """Mark a weight that each rank of several holds whole, with Megatron-core's own marks.

    Core marks the weights of its linear layers as split, and counts every unmarked one in the gradient norm.

    Args:
        is_first: whether this copy is the one that counts.
    """
    parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
    parameter.shared = not is_first  # type: ignore[attr-defined]
