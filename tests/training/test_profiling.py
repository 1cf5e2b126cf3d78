"""Which steps and ranks are profiled, and how the time of nested ranges is told apart."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.errors import UserError
from megatron_nvlm.parallel.ranges import FORWARD, PREFIX, RANGES, CoreRanges, NamedRange
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.profiling import StepProfiler, check_profile, own_seconds, parse_steps, ranges_table

CPU = torch.device("cpu")


@given(st.integers(1, 10**9), st.integers(0, 10**6))
def test_steps_as_written(first: int, more: int) -> None:
    assert parse_steps(f"{first}-{first + more}") == range(first, first + more + 1)
    assert parse_steps(str(first)) == range(first, first + 1)
    if more:
        with pytest.raises(UserError, match="give a step, as 12"):
            parse_steps(f"{first + more}-{first}")


@given(st.text(max_size=12))
def test_anything_else_is_refused_in_one_sentence(text: str) -> None:
    try:
        assert len(parse_steps(text)) > 0
    except UserError as error:
        assert "training.profile is" in str(error)


@given(st.none() | st.sampled_from(["3", "3-5", "0", "x"]), st.lists(st.integers(-2, 9), max_size=3), st.integers(1, 8))
def test_what_passes_the_check_can_be_profiled(steps: str | None, ranks: list[int], world_size: int) -> None:
    try:
        check_profile(steps, ranks, world_size, train_steps=4)
    except UserError:
        return
    assert steps is None or (ranks and set(ranks) <= set(range(world_size)) and parse_steps(steps)[0] <= 4)


@dataclass
class Span:
    start: float
    end: float


@dataclass
class Mark:
    name: str
    time_range: Span
    thread: int = 1
    inside: list["Mark"] = field(default_factory=list)


@st.composite
def nested(draw: st.DrawFn, start: int = 0, depth: int = 3) -> Mark:
    """A range with ranges inside it, none overlapping another."""
    inside, at = [], start + draw(st.integers(0, 3))
    for _ in range(draw(st.integers(0, 2)) if depth else 0):
        one = draw(nested(start=at, depth=depth - 1))
        inside.append(one)
        at = int(one.time_range.end) + draw(st.integers(0, 3))
    return Mark(PREFIX + draw(st.sampled_from(RANGES)), Span(start, at + draw(st.integers(1, 5))), inside=inside)


def flat(mark: Mark) -> list[Mark]:
    return [mark, *(one for inner in mark.inside for one in flat(inner))]


@given(nested(), nested(), st.randoms())
def test_time_within_a_range_is_counted_once(one: Mark, other: Mark, random: Any) -> None:
    for mark in flat(other):
        mark.thread = 2
    marks = flat(one) + flat(other)
    expected: dict[str, float] = {}
    for mark in marks:
        own = mark.time_range.end - mark.time_range.start
        own -= sum(inner.time_range.end - inner.time_range.start for inner in mark.inside)
        name = mark.name.removeprefix(PREFIX)
        expected[name] = expected.get(name, 0.0) + own / 1e6
    random.shuffle(marks)
    found = own_seconds([*marks, Mark("aten::mm", Span(0, 99))])
    assert found == pytest.approx(expected)
    rows = ranges_table(found, 1.0, 1, on_device=False)[1:]
    assert sum(float(row.split()[-2]) for row in rows) == pytest.approx(1, abs=1e-3)


def test_only_chosen_ranks_and_steps_are_profiled(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for rank in (0, 3):
        profiler = StepProfiler("2-3", [3], rank, run_dir, CPU)
        for step in range(1, 5):
            profiler.begin(step)
            with NamedRange(FORWARD):
                torch.ones(64, 64) @ torch.ones(64, 64)
            profiler.end(step)
        profiler.close()
    assert sorted(path.name for path in run_dir.profile.iterdir()) == [
        "steps_2-3_rank_00003.json.gz",
        "steps_2-3_rank_00003.txt",
    ]
    table = (run_dir.profile / "steps_2-3_rank_00003.txt").read_text()
    assert "\nforward " in table and "\naten::mm " in table


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file stands here")
    profiler = StepProfiler("1", [0], 0, RunDir(tmp_path), CPU)
    profiler.begin(1)
    profiler.end(1)
    assert "the profile of steps 1 could not be written" in caplog.text


def test_ranges_are_nvtx_ranges_where_there_is_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    timers = CoreRanges()

    def marked() -> None:
        timers("forward-backward", log_level=1).start(barrier=False)
        timers("forward-compute", log_level=2).start()
        timers("forward-compute").stop()
        with NamedRange("data"):
            timers("forward-send-backward-recv", log_level=2).start()
            timers("forward-send-backward-recv").stop()
        timers("forward-backward").stop()

    marked()
    assert calls == []
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    marked()
    assert calls == ["step/forward", "pop", "step/data", "step/messages", "pop", "pop"]
