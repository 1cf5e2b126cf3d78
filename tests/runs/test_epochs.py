"""A run whose length is given in epochs makes the steps that hold them, and no others."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.launch import launch
from tests.support.loaders import counted_samples
from tests.support.shards import good_samples, read_metrics, write_run

pytestmark = pytest.mark.distributed

TRAIN = "megatron_nvlm.train"
SAMPLES, BATCH = 10, 4


def keys_read(run_dir: Path) -> Counter[str]:
    """How often each sample was used, by the ledger."""
    lines = (run_dir / "ledger.jsonl").read_text().splitlines()
    return Counter(key for line in lines for key in json.loads(line)["keys"])


def test_an_epoch_and_a_half_then_three(tmp_path: Path) -> None:
    path = write_run(tmp_path, training={"train_steps": None, "epochs": 1.5}, data={"ledger": True})
    run_dir = tmp_path / "run"
    printed = launch(TRAIN, 2, "--config", str(path)).stdout
    assert "training.epochs=1.5 are 9 steps; an epoch is the first 24 samples of the order" in printed
    assert printed.count("are 9 steps") == 1
    first = read_metrics(run_dir)
    assert len(first) == 9 and set(keys_read(run_dir).values()) == {1, 2}
    stored = yaml.safe_load((run_dir / "config.yaml").read_text())["training"]
    assert stored["train_steps"] is None and stored["epochs"] == 1.5

    printed = launch(TRAIN, 2, "--config", str(path), "training.epochs=3").stdout
    assert "changed since the checkpoint: training.epochs: 1.5 -> 3.0" in printed
    assert "changed since the checkpoint: training.train_steps: 9 -> 18" in printed
    assert "changed since the checkpoint: optimizer.decay_steps: 9 -> 18" in printed
    assert len(read_metrics(run_dir)) == 18 and set(keys_read(run_dir).values()) == {3}

    steps = ["training.train_steps=9", "training.epochs=null", f"run_dir={tmp_path / 'steps'}"]
    launch(TRAIN, 2, "--config", str(path), *steps)
    counted = [(row["loss"], row["learning_rate"]) for row in read_metrics(tmp_path / "steps")]
    assert counted == [(row["loss"], row["learning_rate"]) for row in first]


def test_epochs_of_packs(tmp_path: Path) -> None:
    tokenizer = qwen2_tokenizer(1024)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    counted_samples(tmp_path / "shards", good_samples(SAMPLES), Tokenizer(tokenizer))
    path = write_run(
        tmp_path,
        tmp_path / "shards",
        training={"train_steps": None, "epochs": 2, "micro_batch_size": 1, "global_batch_size": 2},
        data={"ledger": True, "packing": {"enabled": True, "window_samples": 5}, "system": None},
    )
    printed = launch(TRAIN, 1, "--config", str(path)).stdout
    steps = len(read_metrics(tmp_path / "run"))
    assert f"training.epochs=2 are {steps} steps" in printed
    counts = keys_read(tmp_path / "run")
    assert len(counts) == SAMPLES and min(counts.values()) == 2
    last = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()[-1]
    before = counts - Counter(json.loads(last)["keys"])
    assert min(before.get(key, 0) for key in counts) < 2, "a step fewer holds them too"


def test_so_few_steps_that_no_schedule_is_left(tmp_path: Path) -> None:
    path = write_run(tmp_path, training={"train_steps": None, "epochs": 0.3})
    done = launch(TRAIN, 1, "--config", str(path), check=False)
    assert done.returncode != 0
    assert "optimizer.warmup_steps 2 must be fewer than the 2 steps of the schedule" in done.stderr + done.stdout
