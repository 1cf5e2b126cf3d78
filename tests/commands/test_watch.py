"""The terminal page of runs: one that trains, stops, goes on and is killed; files of failed ones; any other lines."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from megatron_nvlm.commands.watch import main
from megatron_nvlm.exit_codes import DIVERGED
from megatron_nvlm.runs import start_history
from megatron_nvlm.runs.failures import NodeReport, RankFailure, write_report
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.runs.start_history import Beginning
from megatron_nvlm.watching.page import RunPage, duration, sparkline
from tests.support.launch import environment, start
from tests.support.shards import write_run

TMUX = shutil.which("tmux")
NOW = 1_700_000_000.0


def page_of(run_dir: Path) -> str:
    """The page as plain text."""
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(RunPage(RunDir(run_dir)).render(120))
    return console.export_text()


def wait_until(what: str, holds: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not {what} after {seconds} s"
        time.sleep(0.1)


class Screen:
    """A terminal of tmux, in which one command runs."""

    def __init__(self, *command: str) -> None:
        self.socket = f"watch_{os.getpid()}"
        self._tmux("new-session", "-d", "-x", "110", "-y", "40", *command)

    def _tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-L", self.socket, *arguments],
            env={**environment(), "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
        )
        return done.stdout

    def text(self) -> str:
        return self._tmux("capture-pane", "-p")

    def press(self, key: str) -> None:
        self._tmux("send-keys", key)

    def is_open(self) -> bool:
        return bool(self._tmux("list-sessions"))

    def close(self) -> None:
        self._tmux("kill-server")


@pytest.fixture
def screens() -> Iterator[list[Screen]]:
    opened: list[Screen] = []
    yield opened
    for screen in opened:
        screen.close()


@pytest.mark.distributed
@pytest.mark.skipif(TMUX is None, reason="tmux is not installed")
def test_a_run_is_watched_while_it_trains_stops_goes_on_and_is_killed(tmp_path: Path, screens: list[Screen]) -> None:
    run_file = write_run(tmp_path, training={"train_steps": 100_000, "epochs": None})
    run_dir = tmp_path / "run"
    training = start("megatron_nvlm.train", 1, "--config", str(run_file), log=tmp_path / "log")
    wait_until("at work", lambda: (run_dir / "metrics.jsonl").exists())
    written = ("metrics.jsonl", "heartbeat.json")  # by training
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("*") if path.name not in written}
    screen = Screen(sys.executable, "-m", "tools.watch", str(run_dir), "--every", "0.3")
    screens.append(screen)

    def shows(*words: str) -> None:
        wait_until(f"{words} in {screen.text()}", lambda: all(word in screen.text() for word in words))

    shows("running", "of 100000", "left", "loss", "samples a second", "gate of layer", "bad samples")
    first = screen.text()
    wait_until("renewed", lambda: "running" in screen.text() and screen.text() != first)
    (run_dir / "stop").touch()
    assert training.wait(60) == 0
    step = (run_dir / "stopped").read_text().strip()
    shows(f"stopped  after step {step}; the same command goes on from there", f"last checkpoint: step {step}")
    assert before.items() <= {path: path.stat().st_mtime_ns for path in run_dir.glob("*")}.items(), "it writes nothing"

    training = start("megatron_nvlm.train", 1, "--config", str(run_file), log=tmp_path / "log")
    shows("running")
    wait_until("further", lambda: int((run_dir / "metrics.jsonl").read_text().count("\n")) > int(step) + 1)
    ranks = psutil.Process(training.pid).children(recursive=True)
    for process in [psutil.Process(training.pid), *ranks]:
        process.kill()
    training.wait(60)
    psutil.wait_procs(ranks, timeout=60)
    shows("failed  ended after step", "as a process that was killed")
    screen.press("C-c")
    wait_until("closed", lambda: not screen.is_open(), 20)


USE = {
    "tflops_per_rank": 396.0,
    "mfu": 0.4004,
    "hfu": 0.5123,
    "vision_share": 0.25,
    "data_wait_share": 0.031,
    "padding_share": 0.045,
    "peak_memory_gib": 71.25,
}


def write_steps(run_dir: Path, *records: dict[str, Any], first: int = 1) -> None:
    common = {"loss": 1.5, "grad_norm": 0.5, "learning_rate": 1e-3, "samples": 8, "tokens": 640, "tiles": 12}
    common |= {"tiles_per_rank": 6.0, "tile_imbalance": 1.25, "vision_seconds": 0.5, "seconds": 2.0, "bad_samples": 0}
    run_dir.mkdir(exist_ok=True)
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step, record in enumerate(records, first):
            file.write(json.dumps({"step": step, **common, "bad": {}, "gates": {}, **record}) + "\n")


def test_the_numbers_of_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {variant: x}\ntraining: {train_steps: 1000, epochs: null}\n")
    gates = {f"layer_{layer}": layer / 100 for layer in range(0, 60, 6)}
    slow = {"rank": 3, "node": "n2", "seconds": 4.5, "median": 2.0}
    write_steps(
        tmp_path,
        {"bad_samples": 2, "bad": {"broken_image/scans": 2}},
        {"loss": 1.25, "skipped": "gradient norm 80 is over 10 times the median"},
        {"stragglers": [slow], "validation": {"pages/images": {"loss": 0.875, "token_accuracy": 0.5, "targets": 9}}},
        {"gates": gates, "peak_memory_of": "device", **USE},
    )
    (tmp_path / "finished").write_text("4\n")
    page = page_of(tmp_path)
    for said in (
        "NVLM-X",
        "finished  after step 4",
        "step 4 of 1000 (0%), 33 min 12 s of training missing, 8 s trained, no checkpoint yet",
        "lowest 1.2500 at step 2",
        "1 updates left out",
        "samples a second",
        " 320 ",  # tokens a second
        "encoder: 25% of a step",
        "396",
        "MFU 40.0%, HFU 51.2%, vision 25.0%",
        "3.1%",
        "padding: 4.5% of tokens",
        "71.25",
        "of the device, on the fullest rank",
        "2 of 34 (2 broken_image/scans)",
        "step 2: gradient norm 80 is over 10 times the median",
        "step 3: rank 3 on n2 4.50 s, its peers 2.00 s",
        "validation/pages/images",
        "50.0% of tokens right",
        "gate of layer 54",
        "5 of 10 gates are shown",
    ):
        assert said in page, f"{said}\n{page}"


@pytest.mark.parametrize("fault", ["rank", "files of half a word"])
def test_a_failed_run_says_what_failed(fault: str, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    write_steps(tmp_path, {}, {})
    for number, node in enumerate(("n1", "n2")):
        name = f"77.{number}"
        start_history.begin(run_dir, name, "77", ("n1", "n2"))
        failure = RankFailure(3, node, DIVERGED, NOW, "error: the loss of step 3 is nan; go back")
        write_report(run_dir, NodeReport(name, node, (failure,)))
        start_history.end(run_dir, Beginning(name, "77", ("n1", "n2"), 0, {}, NOW), status=1, asked=False)
    if fault != "rank":
        run_dir.failure.write_text('{"message": "the disk is full"}')
    page = page_of(tmp_path)
    if fault == "rank":
        assert "failed  in step 3: rank 3 on n2 (exit code 4): error: the loss of step 3 is nan; go back" in page
    else:
        assert "failed  in step 3: the disk is full" in page
    assert "2, 2 failed" in page and "77.1 began" in page and "deterministic at step 0" in page


def test_a_failure_of_an_earlier_start_is_not_that_of_a_later_one(tmp_path: Path) -> None:
    (tmp_path / "failure.json").write_text('{"message": "the disk was full"}')
    os.utime(tmp_path / "failure.json", (NOW - 99, NOW - 99))
    write_steps(tmp_path, {})
    assert "ended after step 1 without a word" in page_of(tmp_path)


@pytest.mark.parametrize(("age", "said"), [(5, "running  at step 2 on 16 ranks: saving a checkpoint"), (500, "failed")])
def test_a_run_on_another_host_is_known_by_its_heartbeat(age: float, said: str, tmp_path: Path) -> None:
    write_steps(tmp_path, {})
    (tmp_path / "lock").write_text("12 on elsewhere\n")
    beat = {"time": time.time() - age, "step": 2, "action": "saving a checkpoint", "start": "x", "ranks": 16}
    (tmp_path / "heartbeat.json").write_text(json.dumps(beat))
    assert said in page_of(tmp_path)


def test_a_job_whose_ranks_have_not_come_yet(tmp_path: Path) -> None:
    start_history.begin(RunDir(tmp_path), "5.0", "5", ("n1",))
    assert "running  start 5.0 began" in page_of(tmp_path)


def test_a_missing_or_empty_directory_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "empty").mkdir()
    for path, says in (("none", "there is no run directory"), ("empty", "nothing of a run yet"), ("file", "is a file")):
        assert main([str(tmp_path / path), "--once"]) == 2
        printed = capsys.readouterr()
        assert says in printed.err and printed.err.count("\n") == 1 and not printed.out


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**9) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    "loss",
    "grad_norm",
    "seconds",
    "gates",
    "bad",
    "stragglers",
    "skipped",
    "validation",
    "tiles",
    "tiles_per_rank",
    "tflops_per_rank",
    "peak_memory_gib",
    "peak_memory_of",
]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES), max_size=5), VALUES, VALUES)
def test_no_line_and_no_file_ends_the_page(
    tmp_path: Path, records: list[dict[str, Any]], failure: Any, config: Any
) -> None:
    steps = [json.dumps({"step": step, **record}) for step, record in enumerate(records, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(steps) + "\n")
    beat = dict.fromkeys(("time", "step", "action", "ranks"), failure)
    for name, content in (("failure.json", failure), ("heartbeat.json", beat), ("lock", config)):
        (tmp_path / name).write_text(json.dumps(content))
    keys = ("failed_nodes", "time", "first_step", "last_step", "ending")
    start = {"start": "1", **dict.fromkeys(keys, failure)}
    (tmp_path / "starts.jsonl").write_text(json.dumps({"began": start}) + "\n" + json.dumps({"ended": start}) + "\n")
    sections = {"training": {"train_steps": config, "timeout_seconds": config}, "model": config}
    (tmp_path / "config.yaml").write_text(json.dumps(sections))
    assert page_of(tmp_path)


def test_sparklines_and_times() -> None:
    assert sparkline([1, 2, 3, 8], 10) == "▁▂▃█"
    assert sparkline([0.0, 0.0, 7.0, 7.0], 2) == "▁█"
    assert sparkline([float("nan"), 1.0, float("inf")], 5) == " ▁ "
    assert sparkline([float("nan")], 5) == "" == sparkline([], 5)
    assert [duration(time) for time in (4, 75, 3700, 200_000)] == ["4 s", "1 min 15 s", "1 h 01 min", "2 d 7 h"]
