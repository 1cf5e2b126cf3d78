"""Killed at random and gone on with other replicas and workers, a run uses the samples of one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_nvlm.data.order.lengths import TextTokenCounter
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support import data_driver
from tests.support.launch import environment, launch, start
from tests.support.shards import good_samples, write_run, write_samples

LAYOUTS = ((4, 0), (1, 2), (2, 0), (8, 0), (2, 1), (1, 1), (1, 0))
"""(replicas, workers of each), one after the other."""


def two_sets(folder: Path, sizes: tuple[int, int]) -> list[Path]:
    tokenizer = Tokenizer(qwen2_tokenizer(1024))
    counter = TextTokenCounter(tokenizer, "chatml", None)
    counting = {"count_text": counter, "text": counter.description, "samples_per_shard": 7}
    return [
        write_samples(folder / name, good_samples(size), key_prefix=name, **counting)
        for name, size in zip(("first", "second"), sizes, strict=True)
    ]


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def survive(state: Path, shards: list[Path], steps: int, kills: int, packed: bool) -> list[int]:
    """Run the driver to the end through `kills` kills; the steps at which it was killed."""
    rng = random.Random(5)
    ledger = state / "ledger.jsonl"
    reached = []
    for attempt in range(kills + 1):
        replicas, workers = LAYOUTS[attempt % len(LAYOUTS)]
        command = [sys.executable, "-m", "tests.support.data_driver", str(state), *map(str, shards)]
        command += ["--replicas", str(replicas), "--workers", str(workers), "--steps", str(steps)]
        command += ["--packed"] if packed else []
        saved = json.loads((state / "position.json").read_text())["step"] if (state / "position.json").exists() else 0
        process = subprocess.Popen(command, env=environment(), start_new_session=True)
        if attempt == kills:
            assert process.wait(timeout=300) == 0
            return reached
        # Leave enough steps for the kills to come.
        until = saved + rng.randint(1, max(1, (steps - saved) // (kills - attempt)))
        deadline = time.monotonic() + 200
        while lines_of(ledger) < min(until, steps - 1) or not _began(ledger, saved):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        reached.append(lines_of(ledger))
    raise AssertionError


def _began(ledger: Path, saved: int) -> bool:
    """A step of this process stands in the ledger: what lay after the saved one was cut off when it began."""
    return lines_of(ledger) > saved


def check_survival(folder: Path, sizes: tuple[int, int], steps: int, kills: int, packed: bool) -> None:
    shards = two_sets(folder, sizes)
    data_driver.run(folder / "alone", data_driver.make_loaders(shards, 1, 0, packed), steps, pause=0)
    expected = (folder / "alone" / "ledger.jsonl").read_text()
    reached = survive(folder / "killed", shards, steps, kills, packed)
    assert len(reached) == kills and max(reached) < steps
    assert (folder / "killed" / "ledger.jsonl").read_text() == expected
    counts = Counter(key for line in expected.splitlines() for key in json.loads(line))
    if not packed:
        assert set(counts.values()) == {data_driver.ROWS * steps // sum(sizes)} and len(counts) == sum(sizes)


@pytest.mark.parametrize("packed", [False, True])
def test_a_few_kills(tmp_path: Path, packed: bool) -> None:
    check_survival(tmp_path, (24, 8), steps=12, kills=2, packed=packed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("packed", [False, True])
def test_twenty_kills_over_three_epochs(tmp_path: Path, packed: bool) -> None:
    check_survival(tmp_path, (120, 40), steps=60, kills=20, packed=packed)


@pytest.mark.distributed
def test_the_trainer_keeps_its_ledger_through_a_kill_and_another_number_of_replicas(tmp_path: Path) -> None:
    path = write_run(tmp_path, training={"train_steps": 14}, data={"ledger": True})
    run_dir, alone = tmp_path / "run", tmp_path / "alone"
    launch("megatron_nvlm.train", 1, "--config", str(path), f"run_dir={alone}")
    arguments = ["--config", str(path), f"run_dir={run_dir}"]
    process = start("megatron_nvlm.train", 2, *arguments, "data.num_workers=1", log=tmp_path / "log")
    deadline = time.monotonic() + 200
    while lines_of(run_dir / "ledger.jsonl") < 5:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert lines_of(run_dir / "ledger.jsonl") < 14
    launch("megatron_nvlm.train", 1, *arguments, "data.num_workers=1")
    assert (run_dir / "ledger.jsonl").read_text() == (alone / "ledger.jsonl").read_text()
    keys = [key for line in (alone / "ledger.jsonl").read_text().splitlines() for key in json.loads(line)["keys"]]
    assert len(keys) == 56 and set(Counter(keys[:48]).values()) == {2}
