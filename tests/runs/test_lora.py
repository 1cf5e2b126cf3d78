"""Runs that train adapters: what trains and what stays, resumes, starts from other runs, and changed keys."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_nvlm.checkpoint.stream_files import CheckpointWeights
from tests.support.launch import launch
from tests.support.shards import read_metrics, write_run

pytestmark = pytest.mark.distributed

TRAIN = "megatron_nvlm.train"
TRAINABLE = "recipe.trainable=[vision_projection, cross_attention, lora]"
LORA = (TRAINABLE, "model.lora.rank=4", "model.lora.alpha=8")
STEPS = 4


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = {"train_steps": STEPS, "micro_batch_size": 1}
    folder = tmp_path_factory.mktemp("lora")
    return write_run(folder, training=keys, optimizer={"decay_steps": 8, "max_lr": 1e-2})


def run(run_file: Path, name: str, *overrides: str, ranks: int = 1, check: bool = True) -> tuple[Path, str]:
    """The folder of a run and what was printed."""
    folder = run_file.parent / name
    done = launch(TRAIN, ranks, "--config", str(run_file), f"run_dir={folder}", *overrides, check=check)
    return folder, done.stdout + done.stderr


def column(folder: Path) -> list[tuple[Any, ...]]:
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(folder)]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    source = CheckpointWeights(folder / "checkpoints" / f"step_{step:08d}")
    return {name: source.read(name) for name in source.infos}


@pytest.fixture(scope="module")
def whole(run_file: Path) -> Path:
    """All steps without an interruption."""
    return run(run_file, "whole", *LORA)[0]


def test_adapters_train_and_the_language_model_stays(run_file: Path, whole: Path) -> None:
    before, after = weights(whole, 2), weights(whole, STEPS)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapters = {name for name in before if ".adapters." in name}
    assert len(adapters) == 4 * 7 * 2 and adapters <= changed
    others = changed - adapters
    assert others and all("cross_att" in name or name.startswith("vision_projection") for name in others)


def test_a_resume_is_digit_for_digit(run_file: Path, whole: Path) -> None:
    folder, _ = run(run_file, "resumed", *LORA, "training.train_steps=2")
    _, printed = run(run_file, "resumed", *LORA)
    assert "resuming from step 2" in printed and column(folder) == column(whole)
    ours, theirs = weights(folder, STEPS), weights(whole, STEPS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_another_layout_goes_on(run_file: Path, whole: Path) -> None:
    keys = [*LORA, "parallelism.tensor_model_parallel_size=2", "parallelism.sequence_parallel=true"]
    folder, _ = run(run_file, "layouts", *keys, "training.train_steps=2", ranks=2)
    run(run_file, "layouts", *LORA, "parallelism.pipeline_model_parallel_size=2", ranks=2)
    losses = [loss for loss, _ in column(folder)]
    assert losses == pytest.approx([loss for loss, _ in column(whole)], rel=1e-4)


@pytest.mark.slow
def test_in_bf16(run_file: Path) -> None:
    keys = (*LORA, "training.precision=bf16")
    uninterrupted, _ = run(run_file, "bf16", *keys)
    run(run_file, "bf16_again", *keys, "training.train_steps=2")
    folder, _ = run(run_file, "bf16_again", *keys)
    assert column(folder) == column(uninterrupted)
    types = {str(tensor.dtype) for name, tensor in weights(folder, STEPS).items() if ".adapters." in name}
    assert types == {"torch.bfloat16"}


@pytest.mark.slow
def test_weights_of_a_run_without_adapters_begin_one_with(run_file: Path) -> None:
    plain, _ = run(run_file, "plain", "training.train_steps=2")
    keys = (*LORA, "training.train_steps=1", f"checkpoint.initial_weights={plain}")
    folder, printed = run(run_file, "begun", *keys)
    assert f"starting with the weights of {plain}; new: lora" in " ".join(printed.split()).replace(
        f"{plain}/checkpoints/step_00000002", str(plain)
    )
    before, after = weights(plain, 2), weights(folder, 1)
    base = [name for name in before if name.startswith("language_model.") and "cross_att" not in name]
    assert len(base) > 20 and all(torch.equal(before[name], after[name]) for name in base)
    new = [tensor for name, tensor in after.items() if name.endswith(".lora_a")]
    assert new and all(tensor.abs().sum() > 0 for tensor in new), "drawn, though the other weights are loaded"
    _, printed = run(run_file, "back", "training.train_steps=1", f"checkpoint.initial_weights={folder}", check=False)
    assert "model.lora.rank was 4 when the checkpoint" in printed


@pytest.mark.parametrize(
    "key,value,words",
    [
        ("model.lora.rank", "8", "model.lora.rank was 4 when the checkpoint"),
        pytest.param("model.lora.targets", "[q_proj]", "model.lora.targets was ", marks=pytest.mark.slow),
        pytest.param("model.lora.alpha", "16", "allow_changes=[model.lora.alpha] goes on", marks=pytest.mark.slow),
    ],
)
def test_changed_keys_are_refused(run_file: Path, whole: Path, key: str, value: str, words: str) -> None:
    folder = run_file.parent / f"changed_{len(list(run_file.parent.iterdir()))}"
    shutil.copytree(whole, folder)
    _, printed = run(run_file, folder.name, *LORA, f"{key}={value}", "training.train_steps=5", check=False)
    assert words in [line for line in printed.splitlines() if "error: " in line][-1]
    assert len(read_metrics(folder)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("key,value", [("model.lora.dropout", "0.5"), ("model.lora.alpha", "80")])
def test_changed_keys_take_effect(run_file: Path, whole: Path, key: str, value: str) -> None:
    losses = []
    allowed = "checkpoint.allow_changes=[model.lora.alpha]"
    for number, override in enumerate((LORA[2], f"{key}={value}")):
        folder = run_file.parent / f"{key}_{number}"
        shutil.copytree(whole, folder)
        _, printed = run(run_file, folder.name, *LORA, override, allowed, "training.train_steps=5")
        losses.append(column(folder)[-1][0])
    assert f"changed since the checkpoint: {key}: " in printed
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)
