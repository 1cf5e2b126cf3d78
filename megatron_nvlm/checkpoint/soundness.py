"""Whether a state is worth saving: a checkpoint of diverged weights would take the place of the last sound one."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_nvlm.errors import DivergedError
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.models.initialise import named_parameters
from megatron_nvlm.models.nvlm_model import NVLMModel


def refuse_unsound(step: int, model: NVLMModel | ModelChunks, optimizer: MegatronOptimizer, way_back: str) -> None:
    """Raise DivergedError on every rank if weights or optimizer state of any hold a NaN or an infinity; every rank calls it.

    Args:
        way_back: sentence on what the run can go on from.
    """
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, _first_unsound(model, optimizer))
    for rank, name in enumerate(found):
        if name:
            raise DivergedError(
                f"after step {step} {name} of rank {rank} holds values that are not finite, so nothing was saved; {way_back}"
            )


def _first_unsound(model: NVLMModel | ModelChunks, optimizer: MegatronOptimizer) -> str:
    """What holds a value that is not finite; nothing if all are finite. Each device is waited for once.

    PyTorch's AdamW keeps its `step` on the host, beside moments that are on a GPU.
    """
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in _tensors(model, optimizer):
        by_device.setdefault(tensor.device, []).append((name, torch.isfinite(tensor).all()))
    for named in by_device.values():
        finite = torch.stack([sound for _, sound in named]).tolist()
        for (name, _), sound in zip(named, finite, strict=True):
            if not sound:
                return name
    return ""


def _tensors(model: NVLMModel | ModelChunks, optimizer: MegatronOptimizer) -> Iterator[tuple[str, Tensor]]:
    """Weights, then moments and main weights of the optimizer."""
    for name, parameter in named_parameters(model):
        yield f"the weight {name}", parameter.detach()
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        state: dict[Any, Any] = getattr(part.optimizer, "state", {})
        for values in state.values():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    yield f"the optimizer's {name}", value
