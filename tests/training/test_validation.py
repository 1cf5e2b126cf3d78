"""Validation while a run trains: one number under any layout, training untouched, and a warning when text skill goes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_nvlm.config.load import load_run
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.errors import UserError
from megatron_nvlm.models.initialise import component_of, named_parameters
from megatron_nvlm.runs.components import open_data, open_validation
from megatron_nvlm.runs.processes import start
from megatron_nvlm.runs.resolve import resolve_run
from megatron_nvlm.runs.trainer import make_trainer
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from megatron_nvlm.training.loop import Trainer
from megatron_nvlm.training.metric import MetricReducer
from megatron_nvlm.training.metrics import rank_metrics, step_totals
from megatron_nvlm.training.step import run_step
from megatron_nvlm.training.validation import Row
from tests.support.launch import launch
from tests.support.loaders import counted_samples
from tests.support.ranks import run_ranks
from tests.support.shards import good_samples, read_metrics, record, write_run

TRAIN = "megatron_nvlm.train"
TOLERANCE = 1e-9

Sums = dict[str, tuple[float, float, int]]
"""By row: loss, token accuracy, samples."""


def words(count: int) -> list[Any]:
    """Text-only samples."""
    return [(record(f"Say {number} again.", f"it is {number}", images=0), {}) for number in range(count)]


def write_validated_run(folder: Path, **sections: Any) -> Path:
    """A run on two sets, with two to validate on: 13 samples of both kinds, and 5 of text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    qwen2_tokenizer(1024).save(str(path))
    tokenizer = Tokenizer.load(path)
    sets = {"pictures": good_samples(12), "words": words(12), "held": good_samples(13), "talk": words(5)}
    for name, samples in sets.items():
        counted_samples(folder / name, samples, tokenizer)
    train = [
        {"path": str(folder / "pictures"), "weight": 0.75},
        {"path": str(folder / "words"), "weight": 0.25, "name": "text"},
    ]
    validation = {"sets": [{"path": str(folder / "held")}, {"path": str(folder / "talk"), "name": "chat"}]}
    return write_run(
        folder,
        folder / "pictures",
        **{
            **sections,
            "data": {"train": train, "system": None, **sections.get("data", {})},
            "validation": {**validation, "every_steps": 2, **sections.get("validation", {})},
        },
    )


def open_trainer(path: Path, overrides: list[str]) -> Trainer:
    """What the loop works with, on this rank."""
    config = load_run(path, overrides)
    run = resolve_run(config, torch.distributed.get_world_size() if torch.distributed.is_initialized() else _ranks())
    data = open_data(run)
    validation = open_validation(run, data.pipeline)
    return make_trainer(run, data, start(run), validation)


def _ranks() -> int:
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))


def measure(trainer: Trainer) -> dict[str, Row]:
    """The rows of a validation."""
    assert trainer.validator is not None
    measured = trainer.validator.measure(lambda keys: None, lambda: False)
    assert measured is not None
    return dict(measured.rows)


def validate_and_step(path: Path, layouts: dict[str, list[str]]) -> dict[str, Any]:
    """On each rank: validation before and after a step, and the step's losses by source, under each layout."""
    found = {}
    for name, overrides in layouts.items():
        trainer = open_trainer(path, overrides)
        before = measure(trainer)
        micro_batches = trainer.loader.step(DataPosition())
        number = trainer.loader.num_micro_batches
        result = run_step(trainer.model, micro_batches, number, trainer.device, trainer.optimizer)
        own = rank_metrics(result, 0, trainer.bare_model, [source.label for source in trainer.data.train])
        totals = step_totals(MetricReducer(trainer.device).merge(own), result.grad_norm)
        found[name] = {"before": before, "after": measure(trainer), "loss": totals.loss, "sources": totals.sources}
        trainer.loader.close()
        parallel_state.destroy_model_parallel()
    return found


def keys(*parallelism: str) -> list[str]:
    return [f"parallelism.{key}" for key in parallelism]


ONE_RANK = {"one process": [], "packed": ["data.packing.enabled=true", "training.micro_batch_size=1"]}
TWO_RANKS = {
    "TP2": keys("tensor_model_parallel_size=2"),
    "TP2 with SP": keys("tensor_model_parallel_size=2", "sequence_parallel=true"),
    "PP2": keys("pipeline_model_parallel_size=2"),
    "PP2 with two virtual stages": keys(
        "pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2", "payload_vision_tokens=400"
    ),
    "PP2, tiles of the step shared": keys("pipeline_model_parallel_size=2", "vision_placement=replicated"),
    "DP2": ["data.num_workers=1"],
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank has, by layout; all in float64."""
    path = write_validated_run(
        tmp_path_factory.mktemp("layouts"),
        training={"precision": "fp64"},
        optimizer={"clip_grad": 0.0, "warmup_steps": 0},
        parallelism={"use_distributed_optimizer": False},
        model={"cross_attention": {"interval": 2, "gate_init": 0.5}},
    )
    found: dict[str, list[Any]] = {}
    for ranks, layouts in ((1, ONE_RANK), (2, TWO_RANKS)):
        results = run_ranks(ranks, validate_and_step, path, layouts)
        found |= {name: [rank[name] for rank in results] for name in layouts}
    return found


def check_rows(got: dict[str, Row], expected: dict[str, Row]) -> None:
    assert got.keys() == expected.keys()
    for name, row in expected.items():
        assert got[name].loss == pytest.approx(row.loss, rel=TOLERANCE), name
        assert got[name] == Row(got[name].loss, row.token_accuracy, row.targets, row.samples, row.bad_samples), name


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["packed", *TWO_RANKS])
def test_every_layout_measures_what_one_process_measures(measured: dict[str, list[Any]], name: str) -> None:
    """On every rank alike; replicas have unequal numbers of micro-batches."""
    (one,) = measured["one process"]
    assert {row: one["before"][row].samples for row in one["before"]} == {
        "held/images": 10,
        "held/text": 3,
        "chat/text": 5,
    }
    assert one["after"]["held/images"].loss < one["before"]["held/images"].loss
    for rank in measured[name]:
        check_rows(rank["before"], one["before"])
        if name != "packed":  # there a step has other samples
            check_rows(rank["after"], one["after"])


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["one process", *TWO_RANKS])
def test_losses_by_source_add_up_under_every_layout(measured: dict[str, list[Any]], name: str) -> None:
    (one,) = measured["one process"]
    assert one["sources"].keys() == {"pictures", "text"}
    for rank in measured[name]:
        sources = rank["sources"]
        targets = sum(source["targets"] for source in sources.values())
        whole = sum(source["loss"] * source["targets"] for source in sources.values())
        assert whole / targets == pytest.approx(rank["loss"], rel=1e-12)
        for source, expected in one["sources"].items():
            assert sources[source]["targets"] == expected["targets"]
            assert sources[source]["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE), source
