"""Groups of parameters in the optimizer's state: a run has its own, whichever groups its checkpoint was written with.

A checkpoint has moments and main weights by the names of their parameters. In memory core lists them by group, though, and a
load merges these lists with those of the checkpoint, place by place; with other groups it would fail. What is a list by
group is therefore taken out of the state before a load, and put back afterwards.

So is the number of updates, which each kind of optimizer keeps in a form of its own: Transformer Engine's and apex's fused
Adam and core's distributed optimizer by group, PyTorch's Adam by parameter.
"""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

MAIN_WEIGHTS = "fp32_from_fp16_params"
"""Core's lists of main weights, where the optimizer is not distributed and the model is in bf16."""
_BY_PLACE = "main_weights_by_place"
"""The same as a dictionary, during a load."""
_COMMON_UPDATES = "common_step"
"""Where core's optimizers that are not distributed keep the number of updates of all parameters."""


class OwnGroups:
    """The groups of this run, taken out of a state that is to be loaded.

    Args:
        state: of the optimizer, as core's `sharded_state_dict(is_loading=True)` gives it; it is changed.
    """

    def __init__(self, optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
        self._optimizers = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
        self._groups = []
        for part in _parts(state):
            self._groups.append(_holder(part).pop("param_groups"))
            if MAIN_WEIGHTS in part:
                part[_BY_PLACE] = {str(group): _by_place(one) for group, one in enumerate(part.pop(MAIN_WEIGHTS))}

    def put_into(self, loaded: dict[Any, Any]) -> dict[str, Any]:
        """Put the groups into the loaded state, which then is of this run's groups.

        Returns:
            The checkpoint's first group. Adam's constants are the same in all.
        """
        first: dict[str, Any] = {}
        for part, groups, optimizer in zip(_parts(loaded), self._groups, self._optimizers, strict=True):
            stored = _holder(part)["param_groups"]
            first = first or dict(stored[0])
            for group in groups:
                if "params" in group:
                    group["params"] = group["params"].unwrap()
            _holder(part)["param_groups"] = groups
            _put_updates(part, _take_updates(part, stored), optimizer)
            if _BY_PLACE in part:
                places = part.pop(_BY_PLACE)
                part[MAIN_WEIGHTS] = [_in_order(places.get(str(group), {})) for group in range(len(groups))]
        return first


def _parts(state: dict[Any, Any]) -> list[dict[Any, Any]]:
    """The state of each optimizer of a chain, or of one alone."""
    return [state] if "state" in state or "optimizer" in state else [state[key] for key in sorted(state)]


def _holder(part: dict[Any, Any]) -> dict[Any, Any]:
    """The dictionary that has the groups."""
    holder: dict[Any, Any] = part.get("optimizer", part)
    return holder


def _take_updates(part: dict[Any, Any], stored: list[dict[str, Any]]) -> int | None:
    """The number of updates, taken out of a loaded state of whatever optimizer; None if there were none.

    Args:
        stored: the checkpoint's groups.
    """
    common = _holder(part).get("state", {}).pop(_COMMON_UPDATES, None)
    updates = [int(group["step"]) for group in stored if "step" in group]
    return max(updates + ([] if common is None else [int(common)]), default=None)


def _put_updates(part: dict[Any, Any], updates: int | None, optimizer: torch.optim.Optimizer) -> None:
    """Put the number of updates where the optimizer that runs has it."""
    holder = _holder(part)
    of_core = "state" not in holder  # a distributed optimizer: core gives its state by parameter
    for group in holder["param_groups"]:
        group.pop("step", None)
        if updates is not None and (of_core or not isinstance(optimizer, torch.optim.Adam)):
            group["step"] = updates  # an int: fused kernels take no other number
    if updates is not None and not of_core and isinstance(optimizer, torch.optim.Adam):
        holder["state"][_COMMON_UPDATES] = torch.tensor(float(updates))


def _by_place(tensors: list[Any]) -> dict[str, Any]:
    return {str(place): tensor for place, tensor in enumerate(tensors)}


def _in_order(places: dict[str, Any]) -> list[Any]:
    return [places[str(place)] for place in range(len(places))]
