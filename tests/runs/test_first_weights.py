"""A run that loads its weights draws none: for 34B that would take minutes."""

from pathlib import Path

import pytest

from megatron_nvlm import train
from megatron_nvlm.models import initialise
from megatron_nvlm.runs.restore import open_trained_run
from tests.support.ranks import run_ranks
from tests.support.shards import read_metrics, write_run


def drawn(run_file: Path, *keys: str) -> list[str]:
    """In a process of its own: names of the weights that a training draws."""
    return _while_noting(lambda: train.main(["--config", str(run_file), *keys]))


def drawn_to_answer(run_dir: Path) -> list[str]:
    """In a process of its own: names of the weights that a trained run draws before it answers."""
    return _while_noting(lambda: open_trained_run(run_dir))


def _while_noting(work):  # type: ignore[no-untyped-def]
    names = []
    draw = initialise.new_weight
    initialise.new_weight = lambda name, *args: names.append(name) or draw(name, *args)  # type: ignore[func-returns-value]
    assert not isinstance(code := work(), int) or code == 0
    return names


@pytest.mark.distributed
def test_weights_that_are_loaded_are_not_drawn(tmp_path: Path) -> None:
    run_file, first = write_run(tmp_path, optimizer={"decay_steps": 8}), tmp_path / "first"
    assert len(run_ranks(1, drawn, run_file, f"run_dir={first}", "training.train_steps=2")[0]) > 20
    assert run_ranks(1, drawn, run_file, f"run_dir={first}", "training.train_steps=3") == [[]]
    others = (f"checkpoint.initial_weights={first}", f"run_dir={tmp_path / 'second'}", "training.train_steps=1")
    assert run_ranks(1, drawn, run_file, *others) == [[]]
    assert run_ranks(1, drawn_to_answer, first) == [[]]
    losses = [row["loss"] for folder in (first, tmp_path / "second") for row in read_metrics(folder)]
    assert len(losses) == 4
