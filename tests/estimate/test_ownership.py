"""Ownership: a layout in which a parameter is missing, held twice, or cut wrongly is found out."""

from dataclasses import replace

from megatron_nvlm.estimate.ownership import check_ownership
from megatron_nvlm.estimate.ranks import BuiltRank, LocalParameter
from megatron_nvlm.models.sharding import Split, find_split

EMBEDDING = "language_model.embedding.word_embeddings.weight"
GATED = "language_model.decoder.layers.1.mlp.linear_fc1.weight"
NORM = "language_model.decoder.layers.0.input_layernorm.weight"
WHOLE = BuiltRank(
    0,
    0,
    (
        (
            LocalParameter(EMBEDDING, (8, 4), True),
            LocalParameter(NORM, (4,), True),
            LocalParameter(GATED, (12, 4), True),
        ),
    ),
)


def layout() -> list[BuiltRank]:
    """Two stages of two tensor-parallel ranks."""
    first = (LocalParameter(EMBEDDING, (4, 4), True, Split(0)), LocalParameter(NORM, (4,), True))
    second = (LocalParameter(GATED, (6, 4), True, find_split(GATED)),)
    return [BuiltRank(stage, rank, (held,)) for stage, held in enumerate((first, second)) for rank in range(2)]


def without(rank: BuiltRank, name: str) -> BuiltRank:
    return replace(rank, chunks=tuple(tuple(p for p in chunk if p.name != name) for chunk in rank.chunks))


def test_a_right_layout_has_no_problem() -> None:
    assert check_ownership(WHOLE, layout()) == []
    assert check_ownership(WHOLE, [WHOLE]) == []


def test_a_missing_parameter() -> None:
    ranks = [without(rank, NORM) for rank in layout()]
    assert check_ownership(WHOLE, ranks) == [f"{NORM} is on 0 stages [], not 1"]


def test_a_rank_without_its_part() -> None:
    ranks = layout()
    ranks[1] = without(ranks[1], EMBEDDING)
    (problem,) = check_ownership(WHOLE, ranks)
    assert problem.startswith(f"{EMBEDDING} is held [1, 0] times")


def test_two_stages_with_the_same_parameter() -> None:
    ranks = layout()
    ranks[2:] = [replace(rank, chunks=(*rank.chunks, ranks[0].chunks[0])) for rank in ranks[2:]]
    problems = check_ownership(WHOLE, ranks)
    assert f"{NORM} is on 2 stages [0, 1], not 1" in problems
    assert check_ownership(WHOLE, ranks, on_every_stage=("language_model",)) != []


def test_parts_that_do_not_join() -> None:
    ranks = layout()
    ranks[3] = BuiltRank(1, 1, ((LocalParameter(GATED, (4, 4), True, find_split(GATED)),),))
    (problem,) = check_ownership(WHOLE, ranks)
    assert "do not join to (12, 4)" in problem


def test_a_whole_parameter_must_be_whole_everywhere() -> None:
    ranks = layout()
    ranks[1] = replace(ranks[1], chunks=((ranks[1].chunks[0][0], LocalParameter(NORM, (2,), True)),))
    (problem,) = check_ownership(WHOLE, ranks)
    assert problem.startswith(f"{NORM} has parts")


def test_a_parameter_of_no_model() -> None:
    ranks = layout()
    extra = LocalParameter("language_model.decoder.layers.9.input_layernorm.weight", (4,), True)
    ranks[0] = replace(ranks[0], chunks=((*ranks[0].chunks[0], extra),))
    assert check_ownership(WHOLE, ranks) == [f"{extra.name} is no parameter of the whole model"]
