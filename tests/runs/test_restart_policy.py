"""The decision after a start: a table of histories, and what holds for every history."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.exit_codes import DIVERGED, ENDED_WELL, NO_PROGRESS, TOO_MANY_FAILURES, USER_ERROR
from megatron_nvlm.runs.failures import NodeReport, RankFailure, failed_nodes
from megatron_nvlm.runs.restart_policy import Ending, Start, decide

FINISHED, STOPPED, MISTAKE, FAILED = Ending.FINISHED, Ending.STOPPED, Ending.DETERMINISTIC, Ending.FAILED
BAD = ("n1",)
# starts, whether the job is queued again, its exit code, excluded nodes; 3 failures are allowed
CASES = {
    "finished": ([Start(FINISHED, 0, 9)], False, ENDED_WELL, ()),
    "finished after a failure": ([Start(FAILED, 0, 0), Start(FINISHED, 0, 9)], False, ENDED_WELL, ()),
    "a mistake": ([Start(MISTAKE, 0, 0, exit_code=USER_ERROR)], False, USER_ERROR, ()),
    "diverged after progress": ([Start(STOPPED, 0, 5), Start(MISTAKE, 5, 7, (), DIVERGED)], False, DIVERGED, ()),
    "time limit": ([Start(STOPPED, 0, 5)], True, ENDED_WELL, ()),
    "time limit, often": ([Start(STOPPED, step, step + 1) for step in range(50)], True, ENDED_WELL, ()),
    "one crash before the first save": ([Start(FAILED, 0, 0)], True, ENDED_WELL, ()),
    "two without progress": ([Start(FAILED, 4, 4), Start(STOPPED, 4, 4)], False, NO_PROGRESS, ()),
    "progress between": ([Start(FAILED, 4, 4), Start(FAILED, 4, 6), Start(FAILED, 6, 6)], True, ENDED_WELL, ()),
    "too many": ([Start(FAILED, step, step + 1) for step in range(4)], False, TOO_MANY_FAILURES, ()),
    "a node once": ([Start(FAILED, 0, 0, BAD)], True, ENDED_WELL, ()),
    "a node twice": ([Start(FAILED, 0, 0, BAD), Start(FAILED, 0, 0, BAD)], True, ENDED_WELL, BAD),
    "named twice in one start": ([Start(FAILED, 0, 1, ("n1", "n1"))], True, ENDED_WELL, ()),
    "two nodes once": ([Start(FAILED, 0, 1, BAD), Start(FAILED, 1, 2, ("n2",))], True, ENDED_WELL, ()),
}
STARTS = st.lists(
    st.builds(
        lambda ending, first, gain, nodes: Start(
            ending, first, first + gain, tuple(nodes), USER_ERROR if ending is MISTAKE else ENDED_WELL
        ),
        st.sampled_from(Ending),
        st.integers(0, 20),
        st.integers(0, 2),
        st.lists(st.sampled_from(["n1", "n2", "n3"]), max_size=2),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("case", CASES)
def test_decision(case: str) -> None:
    starts, requeue, exit_code, excluded = CASES[case]
    decision = decide(starts, max_failures=3)
    assert (decision.requeue, decision.exit_code, decision.excluded_nodes) == (requeue, exit_code, excluded)


def test_no_start_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one start"):
        decide([], max_failures=3)


@given(STARTS, st.integers(0, 5))
def test_what_holds_for_every_history(starts: list[Start], max_failures: int) -> None:
    decision = decide(starts, max_failures)
    if starts[-1].ending in (FINISHED, MISTAKE):
        assert not decision.requeue
    if decision.requeue:
        assert sum(start.ending is FAILED for start in starts) <= max_failures
    assert (decision.exit_code == ENDED_WELL) == (decision.requeue or starts[-1].ending is FINISHED)
    assert "\n" not in decision.reason and decision.reason
    named = [node for start in starts for node in set(start.failed_nodes)]
    assert set(decision.excluded_nodes) == {node for node in named if named.count(node) >= 2}


@given(st.integers(0, 20), st.integers(0, 8), st.lists(st.sampled_from([STOPPED, FAILED]), min_size=20, max_size=20))
def test_a_run_without_progress_never_loops(step: int, max_failures: int, endings: list[Ending]) -> None:
    starts: list[Start] = []
    for ending in endings:
        starts.append(Start(ending, step, step))
        if not decide(starts, max_failures).requeue:
            break
    assert len(starts) <= 2


@given(st.lists(st.lists(st.sampled_from(["n1", "n2", "n3", "n4"]), max_size=1), min_size=20, max_size=20))
def test_nodes_that_take_the_blame_in_turn_do_not_make_a_loop(blamed: list[list[str]]) -> None:
    starts: list[Start] = []
    for nodes in blamed:
        starts.append(Start(FAILED, 4, 4, tuple(nodes)))
        if not decide(starts, max_failures=30).requeue:
            break
    # Each of four nodes once without a second failure, the one that is excluded, and two starts after it.
    assert len(starts) <= 7


def test_where_most_nodes_failed_by_themselves_none_is_to_blame() -> None:
    def report(node: str, message: str) -> NodeReport:
        return NodeReport("7.0", node, (RankFailure(0, node, 1, 1.0, message),))

    nodes = ("n1", "n2", "n3", "n4")
    alone = [report("n1", "out of memory"), *(report(node, "Connection closed by peer") for node in nodes[1:])]
    assert failed_nodes(alone, nodes) == ("n1",)
    assert failed_nodes([report(node, "out of memory") for node in nodes[:3]], nodes) == ()
    assert failed_nodes(alone[1:], nodes) == ("n1",), "the one that left no word"
    assert failed_nodes(alone[:1], nodes[:1]) == ("n1",)
