"""Groups of parameters in the optimizer's state: a run has its own, whichever groups its checkpoint was written with.

A checkpoint has moments and main weights by the names of their parameters. In memory core lists them by group, though, and a
load merges these lists with those of the checkpoint, place by place; with other groups it would fail. What is a list by
group is therefore taken out of the state before a load, and put back afterwards.
"""

from typing import Any

MAIN_WEIGHTS = "fp32_from_fp16_params"
"""Core's lists of main weights, where the optimizer is not distributed and the model is in bf16."""
_BY_PLACE = "main_weights_by_place"
"""The same as a dictionary, during a load."""


class OwnGroups:
    """The groups of this run, taken out of a state that is to be loaded.

    Args:
        state: of the optimizer, as core's `sharded_state_dict(is_loading=True)` gives it; it is changed.
    """

    def __init__(self, state: dict[Any, Any]) -> None:
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
        for part, groups in zip(_parts(loaded), self._groups, strict=True):
            stored = _holder(part)["param_groups"]
            first = first or dict(stored[0])
            updates = [group["step"] for group in stored if "step" in group]
            for group in groups:
                if updates:  # core's distributed optimizer and fused Adam count their updates here
                    group["step"] = max(updates)
                if "params" in group:
                    group["params"] = group["params"].unwrap()
            _holder(part)["param_groups"] = groups
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


def _by_place(tensors: list[Any]) -> dict[str, Any]:
    return {str(place): tensor for place, tensor in enumerate(tensors)}


def _in_order(places: dict[str, Any]) -> list[Any]:
    return [places[str(place)] for place in range(len(places))]
