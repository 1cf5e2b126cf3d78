"""A build that is interrupted, or has too many rejects, stops within a moment, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_nvlm.commands import build_shards
from megatron_nvlm.data.shards.read import ShardSet
from tests.support.launch import environment
from tests.support.shards import picture

COUNT = 400
SECONDS = 20
"""Far more than stopping takes on a busy machine, far less than the blocks that are left take."""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large pictures, so that each block takes seconds."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "large.png").write_bytes(picture(1500, 1500))
    line = json.dumps({"image": "large.png", "question": "What?", "answer": "A picture."})
    (folder / "lines.jsonl").write_text(f"{line}\n" * COUNT)
    return folder / "lines.jsonl"


def command(lines: Path, out: Path, *options: str) -> list[str]:
    own = ("--jsonl", str(lines), "--out", str(out), "--processes", "2", "--samples-per-shard", "100", "--quiet")
    return [sys.executable, "-m", "tools.build_shards", *own, *options]


def begin(lines: Path, out: Path) -> subprocess.Popen[str]:
    """In a group of its own, as a terminal has it, with both workers at their first block."""
    started = subprocess.Popen(
        command(lines, out),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.partial"))) < 2:
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.05)
    return started


def ends(started: subprocess.Popen[str]) -> str:
    """What it says as it ends, soon and with all its processes."""
    try:
        _, said = started.communicate(timeout=SECONDS)
        with pytest.raises(ProcessLookupError):
            os.killpg(started.pid, 0)
        return said
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_stops_it_at_once(lines: Path, tmp_path: Path, times: int) -> None:
    out = tmp_path / "set"
    started = begin(lines, out)
    for number in range(times):
        time.sleep(0.05 * number)
        os.killpg(started.pid, signal.SIGINT)
    assert ends(started) == "interrupted; the same command goes on\n" and started.returncode == 130
    assert not (out / "manifest.json").exists() and len(list(out.glob("shard-*.tar"))) == 0


@pytest.mark.slow
def test_the_same_command_goes_on(lines: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    started = begin(lines, out)
    os.killpg(started.pid, signal.SIGINT)
    ends(started)
    subprocess.run(command(lines, out), env=environment(), check=True)
    assert len(ShardSet(out)) == COUNT


def test_after_too_many_rejects_no_process_works_on(lines: Path, tmp_path: Path) -> None:
    """The first block has the rejects; the others would take a minute."""
    mixed, out = tmp_path / "mixed.jsonl", tmp_path / "set"
    mixed.write_text('{"image": "none.png", "caption": "x"}\n' * 100 + lines.read_text())
    started = subprocess.Popen(
        command(mixed, out, "--images-dir", str(lines.parent), "--max-reject-rate", "0.1"),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert "100 of 500 inputs were rejected" in ends(started) and started.returncode == 2
    assert len(list(out.glob("shard-*.tar"))) == 0


def test_a_second_ctrl_c_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own way of stopping comes to its end, whenever the second signal reaches it."""
    stopped = []

    def build(options: object) -> str:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:  # as the workers are being ended
            signal.raise_signal(signal.SIGINT)
            stopped.append(True)
        return "a signal that was lost"

    monkeypatch.setattr(build_shards, "build", build)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            build_shards.main(["--out", str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped == [True] and ended.value.code == 130
