"""A slow rank is named with its node, a save that takes long is no alarm."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.training.stragglers import find_stragglers
from tests.support.launch import launch, start
from tests.support.shards import read_metrics, write_run
from tests.training.test_watchdog import is_alive, ranks_of


@given(st.lists(st.floats(0.9, 1.2), min_size=2, max_size=9), st.integers(0, 8), st.floats(2.5, 100))
def test_the_slow_rank_alone_is_named(seconds: list[float], place: int, slow: float) -> None:
    place %= len(seconds)
    nodes = [f"n{rank}" for rank in range(len(seconds))]
    same = [(0, 0)] * len(seconds)
    assert find_stragglers(seconds, nodes, same) == []
    seconds[place] = slow
    (found,) = find_stragglers(seconds, nodes, same)
    assert (found.rank, found.node) == (place, f"n{place}")


def test_stages_are_not_compared_with_each_other() -> None:
    assert find_stragglers([1.0, 5.0, 1.1, 5.2], ["n"] * 4, [(0, 0), (0, 1)] * 2) == []


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_is_slowed_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path, training={"train_steps": 100_000})
    log, run_dir = tmp_path / "log", tmp_path / "run"
    settings = ("checkpoint.save_every_steps=100000", "logging.straggler_steps=10")
    process = start("megatron_nvlm.train", 2, "--config", str(path), *settings, log=log)
    deadline = time.monotonic() + 150

    def rows() -> list[dict[str, Any]]:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        return read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []

    while len(rows()) < 3:
        time.sleep(0.2)
    pids = ranks_of(process.pid)
    named: list[dict[str, Any]] = []
    try:
        # Three whole windows: the first may have begun before the rank was slowed.
        until = len(rows()) + 40
        while len(rows()) < until and len(named) < 2:
            os.kill(pids[1], signal.SIGSTOP)
            time.sleep(0.6)
            os.kill(pids[1], signal.SIGCONT)
            time.sleep(0.1)
            named = [slow for row in rows() for slow in row.get("stragglers", [])]
        (run_dir / "stop").touch()
        assert process.wait(timeout=60) == 0
    finally:
        for pid in pids.values():
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
    assert named and {slow["rank"] for slow in named} == {1}, named
    assert f"slow: rank 1 on {os.uname().nodename} takes " in log.read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_save_longer_than_the_limit_of_a_step_is_no_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 8
    path = write_run(tmp_path, training={"train_steps": 3, "timeout_seconds": limit})
    monkeypatch.setenv("SLOW_SAVE", str(limit + 4))
    said = launch("tests.support.disturbed_training", 1, "--config", str(path)).stdout
    assert "finished after step 3" in said
    other = f"run_dir={tmp_path}/other"
    ended = launch(
        "tests.support.disturbed_training",
        1,
        "--config",
        str(path),
        other,
        "training.save_timeout_seconds=5",
        check=False,
    )
    assert "saving a checkpoint" in ended.stderr and "has waited for 5 s, training.save_timeout_seconds" in ended.stderr
