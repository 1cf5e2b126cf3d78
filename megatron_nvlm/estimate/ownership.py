"""Whether the ranks of a layout hold the model: every parameter in one pipeline stage, its parts making it whole."""

from collections.abc import Sequence

import torch

from megatron_nvlm.estimate.ranks import BuiltRank, LocalParameter
from megatron_nvlm.models.initialise import EMBEDDING
from megatron_nvlm.models.sharding import join


def check_ownership(
    whole: BuiltRank, ranks: Sequence[BuiltRank], on_every_stage: Sequence[str] = (), tied_embeddings: bool = False
) -> list[str]:
    """What is wrong with who holds what, a sentence each; empty if every parameter is owned exactly once per replica.

    A parameter is owned by one stage; there each tensor-parallel rank holds its part, and the parts, joined as
    models/sharding.py says, have the whole shape. A parameter without a split is whole on each tensor-parallel rank.

    Args:
        whole: the model on a single rank.
        ranks: every tensor-parallel rank of every stage.
        on_every_stage: parts of the model that the layout keeps on all stages (a replicated encoder).
        tied_embeddings: whether the last stage keeps a copy of the first one's embedding, its output layer.
    """
    stages = 1 + max(rank.stage for rank in ranks)
    tensor_ranks = 1 + max(rank.tensor_rank for rank in ranks)
    holders: dict[str, dict[tuple[int, int], list[LocalParameter]]] = {}
    for rank in ranks:
        for parameter in rank.parameters:
            of_name = holders.setdefault(parameter.name, {})
            of_name.setdefault((rank.stage, rank.tensor_rank), []).append(parameter)
    problems = [f"{name} is no parameter of the whole model" for name in holders.keys() - _names(whole)]
    for parameter in whole.parameters:
        held = holders.get(parameter.name, {})
        wanted_stages = stages if parameter.part in on_every_stage else 1
        if tied_embeddings and parameter.name == EMBEDDING:
            wanted_stages = min(2, stages)
        held_stages = sorted({stage for stage, _ in held})
        if len(held_stages) != wanted_stages:
            problems.append(f"{parameter.name} is on {len(held_stages)} stages {held_stages}, not {wanted_stages}")
            continue
        for stage in held_stages:
            copies = [held.get((stage, tensor_rank), []) for tensor_rank in range(tensor_ranks)]
            if any(len(copy) != 1 for copy in copies):
                problems.append(
                    f"{parameter.name} is held {[len(copy) for copy in copies]} times by the tensor-parallel "
                    f"ranks of stage {stage}, not once by each"
                )
            elif not _makes_whole([copy[0] for copy in copies], parameter.shape):
                problems.append(
                    f"{parameter.name} has parts {[copy[0].shape for copy in copies]} on stage {stage} that do not join "
                    f"to {parameter.shape}"
                )
    return problems


def _names(rank: BuiltRank) -> set[str]:
    return {parameter.name for parameter in rank.parameters}


def _makes_whole(parts: Sequence[LocalParameter], whole: tuple[int, ...]) -> bool:
    split = parts[0].split
    if any(part.split != split for part in parts):
        return False
    if split is None:
        return all(part.shape == whole for part in parts)
    try:
        joined = join([torch.empty(part.shape, device="meta") for part in parts], split)
    except RuntimeError:  # parts that cannot stand side by side
        return False
    return tuple(joined.shape) == whole
