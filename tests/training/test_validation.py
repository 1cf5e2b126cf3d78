"""Validation while a run trains: one number under any layout, training untouched, and a warning when text skill goes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from megatron.core import parallel_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_nvlm.config.load import load_run
from megatron_nvlm.data.config import ValidationConfig
from megatron_nvlm.data.loading.builder import ListedData
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.data.order.listed import ListedBatchPlan, list_samples
from megatron_nvlm.data.shards.index import (
    IMAGE_DTYPE,
    IMAGES_FILE,
    INDEX_FILE,
    SAMPLE_DTYPE,
    SAMPLES_FILE,
    hash_file,
    sign,
)
from megatron_nvlm.errors import UserError
from megatron_nvlm.models.initialise import component_of, named_parameters
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.parallel.groups import world_size_from_environment
from megatron_nvlm.runs.components import open_data, open_validation
from megatron_nvlm.runs.processes import start
from megatron_nvlm.runs.resolve import resolve_run
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.runs.trainer import make_trainer
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from megatron_nvlm.training.loop import Trainer
from megatron_nvlm.training.metric import MetricReducer
from megatron_nvlm.training.metrics import LoggingConfig, MetricsWriter, _source_metrics, rank_metrics, step_totals
from megatron_nvlm.training.step import SampleLoss, StepResult, run_step
from megatron_nvlm.training.validation import Measured, Row, StartLosses, describe, evaluation_mode
from tests.support.launch import launch
from tests.support.loaders import counted_samples
from tests.support.ranks import run_ranks
from tests.support.shards import good_samples, picture, read_metrics, record, write_run, write_samples

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
    run = resolve_run(config, world_size_from_environment())
    data = open_data(run)
    validation = open_validation(run, data.pipeline)
    return make_trainer(run, data, start(run), validation)


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
    assert 0 < one["after"]["held/images"].token_accuracy < 1
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


def text_loss_and_weights(folder: Path) -> dict[str, Any]:
    """Of each variant before step 1: the rows, and the language model."""
    found = {}
    for name, overrides in {
        "d": ["model.variant=d"],
        "x": ["model.variant=x"],
        "h": ["model.variant=h"],
        "h, open gates": ["model.variant=h", "model.cross_attention.gate_init=0.7"],
    }.items():
        trainer = open_trainer(folder / "run.yaml", overrides)
        weights = {
            parameter: value.detach().clone()
            for parameter, value in named_parameters(trainer.bare_model)
            if component_of(parameter) == "language_model"
        }
        found[name] = measure(trainer), weights
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.distributed
def test_before_step_1_text_loss_is_that_of_the_language_model(tmp_path: Path) -> None:
    """Digit for digit, also of the set that holds images too. NVLM-D without images is the plain language model."""
    write_validated_run(tmp_path)
    (found,) = run_ranks(1, text_loss_and_weights, tmp_path)
    own_rows, own_weights = found.pop("d")
    for name, (rows, weights) in found.items():
        assert all(torch.equal(weights[parameter], value) for parameter, value in own_weights.items()), name
        assert rows["chat/text"] == own_rows["chat/text"] and rows["held/text"] == own_rows["held/text"], name
    assert found["h"][0]["held/images"] != own_rows["held/images"] != found["x"][0]["held/images"]


def steps_with_dropout(path: Path, validates: bool) -> tuple[list[float], torch.Tensor, bool]:
    """Losses of three steps, the state of the random numbers after them, and whether dropout is then on."""
    trainer = open_trainer(path, ["model.hidden_dropout=0.2", "model.attention_dropout=0.2"])
    losses, position = [], DataPosition()
    for _ in range(3):
        if validates:
            measure(trainer)
        micro_batches, number = trainer.loader.step(position), trainer.loader.num_micro_batches
        result = run_step(trainer.model, micro_batches, number, trainer.device, trainer.optimizer)
        losses += [result.loss_sum, result.grad_norm, result.encoded_tiles]
        position = trainer.loader.after(position)
    return losses, torch.get_rng_state(), all(module.training for module in trainer.bare_model.modules())


@pytest.mark.distributed
def test_dropout_draws_the_same_with_and_without_validation(tmp_path: Path) -> None:
    path = write_validated_run(tmp_path)
    ((losses, state, training),) = run_ranks(1, steps_with_dropout, path, True)
    ((expected, expected_state, _),) = run_ranks(1, steps_with_dropout, path, False)
    assert losses == expected and torch.equal(state, expected_state) and training


STEPS = 5


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a run with validations after steps 2, 4 and 5, which is in `whole` beside it."""
    path = write_validated_run(
        tmp_path_factory.mktemp("validated"), training={"train_steps": STEPS}, logging={"tensorboard": True}
    )
    launch(TRAIN, 1, "--config", str(path), f"run_dir={path.parent / 'whole'}")
    return path


@pytest.mark.distributed
def test_training_is_the_same_digit_for_digit_without_validation(validated: Path, tmp_path: Path) -> None:
    launch(TRAIN, 1, "--config", str(validated), f"run_dir={tmp_path}", "validation.sets=[]")
    compared = ("step", "loss", "grad_norm", "consumed_samples", "sources", "tiles", "tiles_per_rank")
    got, expected = read_metrics(tmp_path), read_metrics(validated.parent / "whole")
    assert [[row[key] for key in compared] for row in got] == [[row[key] for key in compared] for row in expected]
    assert not any(key.startswith("validation") for row in got for key in row)
    assert [row["step"] for row in expected if "validation" in row] == [2, 4, 5]
    assert expected[0].keys() >= {"validation_at_start", "validation_at_start_seconds"}


def validations(run_dir: Path) -> dict[int, Any]:
    return {row["step"]: row["validation"] for row in read_metrics(run_dir) if "validation" in row}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_is_resumed_between_validations_measures_the_same(validated: Path, tmp_path: Path) -> None:
    base = ["--config", str(validated), f"run_dir={tmp_path}", f"optimizer.decay_steps={STEPS}"]
    launch(TRAIN, 1, *base, "training.train_steps=3")
    at_end = validations(tmp_path).pop(3)
    done = launch(TRAIN, 1, *base)
    assert "resuming from step 3" in done.stdout and "validation after step 4  chat/text  loss " in done.stdout
    got, expected = validations(tmp_path), validations(validated.parent / "whole")
    assert got == {3: at_end, **expected}
    start_row = read_metrics(tmp_path)[0]["validation_at_start"]["chat/text"]
    for rows in got.values():
        assert rows["chat/text"]["loss_at_start"] == start_row["loss"]
        assert rows["chat/text"]["loss_rise"] < 0 and not rows["chat/text"]["over_margin"]
        assert "loss_at_start" not in rows["held/images"]


@pytest.mark.distributed
def test_tensorboard_has_validations_and_sources(validated: Path) -> None:
    events = EventAccumulator(str(validated.parent / "whole" / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert {"validation/chat/text/loss", "validation/held/images/token_accuracy", "source_loss/text"} <= {*tags}
    assert [event.step for event in events.Scalars("validation/chat/text/loss")] == [0, 2, 4, 5]


def test_modules_are_as_they_were_after_a_validation() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1))
    model[1].eval()
    with pytest.raises(KeyError), evaluation_mode([model]):  # type: ignore[list-item]
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]


@pytest.fixture
def validated_data(tmp_path: Path) -> tuple[ListedData, ValidationConfig]:
    """Opened sets and their section."""
    run = resolve_run(load_run(write_validated_run(tmp_path)), 1)
    data = open_validation(run, open_data(run).pipeline)
    assert data is not None
    return data, run.config.validation


def rows_of(text_loss: float) -> dict[str, Row]:
    return {name: Row(text_loss, 0.5, 9, 3, 0) for name in ("held/images", "held/text", "chat/text")}


def test_a_text_loss_that_rises_is_told(
    validated_data: tuple[ListedData, ValidationConfig], world_of_one: Device, tmp_path: Path
) -> None:
    data, config = validated_data
    losses = StartLosses(tmp_path / "start.json", data)
    losses.keep(Measured(rows_of(2.0), 1.0), config)
    again = StartLosses(tmp_path / "start.json", data)
    again.read(config)
    for one in (losses, again):
        rows, warning = one.compare(rows_of(2.04), 0.05)
        assert not warning and not rows["held/text"]["over_margin"]
        rows, warning = one.compare({**rows_of(2.04), "chat/text": Row(2.06, 0.5, 9, 3, 0)}, 0.05)
        assert warning.startswith(
            "text-only loss has risen by more than validation.text_margin of 0.05: chat/text 2.06"
        )
        assert [name for name, row in rows.items() if row.get("over_margin")] == ["chat/text"]
        assert rows["chat/text"]["loss_rise"] == pytest.approx(0.06)
        assert one.compare(rows_of(float("nan")), 0.05)[1]


def test_a_set_with_other_samples_is_compared_with_nothing(
    validated_data: tuple[ListedData, ValidationConfig],
    world_of_one: Device,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data, config = validated_data
    path = tmp_path / "start.json"
    StartLosses(path, data).keep(Measured(rows_of(2.0), 1.0), config)
    stored = json.loads(path.read_text())
    stored["samples_of_sets"]["chat"] = "others"
    path.write_text(json.dumps(stored))
    other = StartLosses(path, data)
    other.read(config)
    rows, _ = other.compare(rows_of(3.0), 0.05)
    assert "loss_at_start" not in rows["chat/text"] and rows["held/text"]["loss_rise"] == 1.0
    path.write_text("{")
    broken = StartLosses(path, data)
    broken.read(config)
    assert not broken.compare(rows_of(3.0), 0.05)[1] and "cannot be read" in caplog.text
    path.unlink()
    StartLosses(path, data).read(config)
    assert "did not measure its validation sets before step 1" in caplog.text


def test_one_line_of_the_log_warns(world_of_one: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = MetricsWriter(RunDir(tmp_path), LoggingConfig(tensorboard=False), 0, 5)
    row = {"loss": 2.0, "token_accuracy": 0.5, "samples": 3, "bad_samples": 1, "loss_rise": 0.5}
    writer.write(
        {
            **{
                "step": 2,
                "loss": 1.0,
                "learning_rate": 0.1,
                "grad_norm": 1.0,
                "seconds": 1.0,
                "gates": {},
                "sources": {},
            },
            **{"validation": {"a/text": row}, "validation_seconds": 1.0, "validation_warning": "text skill is lost"},
        }
    )
    writer.close()
    assert capsys.readouterr().out.splitlines() == [
        "validation after step 2  a/text  loss 2.0000  token accuracy 50.0%  +0.5000 since the start  (3 samples, 1 bad)",
        "validation after step 2 took 1.0 s",
        "warning: text skill is lost",
    ]


def test_a_request_to_stop_ends_a_validation(tmp_path: Path) -> None:
    path = write_validated_run(tmp_path)
    (found,) = run_ranks(1, measure_until_stopped, path)
    assert found == (None, 1)


def measure_until_stopped(path: Path) -> tuple[Any, int]:
    trainer = open_trainer(path, [])
    asked: list[bool] = []

    def stops() -> bool:
        asked.append(True)
        return True

    assert trainer.validator is not None and trainer.validator.data.plan.rounds > 2
    return trainer.validator.measure(lambda keys: None, stops), len(asked)


def measure_with_bad_samples(path: Path) -> dict[str, Row]:
    return measure(open_trainer(path, ["validation.sets.1.samples=3"]))


@pytest.mark.distributed
def test_bad_samples_are_counted_and_left_out(tmp_path: Path) -> None:
    """A sample whose image is broken, and a set of which nothing can be used."""
    path = write_validated_run(tmp_path)
    samples = good_samples(13)
    samples[1] = (record("?", "half"), {"0.jpg": picture(168, 112, "JPEG")[:2000]})
    write_samples(tmp_path / "broken", samples)
    write_samples(tmp_path / "unusable", [(record("?", "x", images=0) | {"conversation": []}, {})])
    run = yaml.safe_load(path.read_text())
    run["validation"]["sets"] += [{"path": str(tmp_path / name)} for name in ("broken", "unusable")]
    path.write_text(yaml.safe_dump(run))
    (rows,) = run_ranks(1, measure_with_bad_samples, path)
    whole, broken = rows["held/images"], rows["broken/images"]
    assert (broken.samples, broken.bad_samples, whole.bad_samples) == (9, 1, 0)
    assert broken.targets < whole.targets and broken.loss != whole.loss and rows["broken/text"] == rows["held/text"]
    assert rows["unusable/text"] == Row(None, None, 0, 0, 1)
    assert rows["chat/text"].samples == 3
    assert describe(1, {name: vars(row) for name, row in rows.items()}, 1.0)[-2].endswith(
        "no targets  (0 samples, 1 bad)"
    )


def test_sets_of_one_name_are_counted_together() -> None:
    samples = tuple(SampleLoss(dataset, False, 1.0 + dataset, 2, 0) for dataset in (0, 1, 2, 1))
    result = StepResult(8.0, 8.0, 0.0, 9, 0, (), {}, 0, 0.0, 0.0, "", samples)
    values = {metric.name: metric.value for metric in _source_metrics(result, ["a", "b", "a"])}
    assert values == {"source_loss/a": 4.0, "source_loss/b": 4.0, "source_targets/a": 4, "source_targets/b": 4}


def test_sets_are_listed_evenly_and_by_kind(validated_data: tuple[ListedData, ValidationConfig]) -> None:
    indexes = [shards.index for shards in validated_data[0].sets]
    whole = list_samples(indexes, [None, 99])
    assert whole.group_sizes == (10, 3, 0, 5) and len(whole) == 18
    assert [sample.number for sample in whole.samples[10:13]] == [3, 7, 11]
    some = list_samples(indexes, [4, 2])
    assert [(sample.dataset, sample.number) for sample in some.samples] == [
        *((0, 0), (0, 6), (0, 9), (0, 3)),  # text only last
        *((1, 0), (1, 2)),
    ]


@pytest.mark.parametrize("count", range(1, 20))
@pytest.mark.parametrize(("most", "multiple"), [(4, 1), (4, 2), (1, 2), (6, 3), (64, 4)])
def test_rounds_hold_every_micro_batch_once(count: int, most: int, multiple: int) -> None:
    plan = ListedBatchPlan([(number,) for number in range(count)], most, multiple)
    position, seen = DataPosition(), []
    for _ in range(plan.rounds):
        step = plan.step(position)
        assert len(step.micro_batches) == plan.micro_batches_per_step <= max(most, multiple)
        assert plan.micro_batches_per_step % multiple == 0
        seen += [place for micro_batch in step.micro_batches for place in micro_batch]
        position = step.after
    assert seen == list(range(count))
    assert plan.step(position).micro_batches == ((),) * plan.micro_batches_per_step


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["validation.sets.0.path=nowhere"],
            "validation.sets, nowhere: nowhere is no folder of shards .* correct its path",
        ),
        (["validation.sets.1.path=EMPTY"], "validation.sets, chat: .*empty holds no samples; build it again, or leave"),
        (
            ["tiling.tag_format=none", "validation.sets.0.path=OTHER"],
            "hold tiles of 28 pixels and tiling.tile_size is 56",
        ),
        (
            ["data.packing.enabled=true", "training.micro_batch_size=1", "validation.sets.0.path=OTHER"],
            "does not know the text tokens of its samples, which packing needs",
        ),
    ],
)
def test_a_set_that_cannot_be_read_is_named(tmp_path: Path, overrides: list[str], says: str) -> None:
    path = write_validated_run(tmp_path)
    write_samples(tmp_path / "other", good_samples(2), settings={} if "packing" in says else {"tile_size": 28})
    make_empty(tmp_path / "empty", tmp_path / "other")
    named = {"EMPTY": "empty", "OTHER": "other"}
    for name, folder in named.items():
        overrides = [override.replace(name, str(tmp_path / folder)) for override in overrides]
    run = resolve_run(load_run(path, overrides), 1)
    with pytest.raises(UserError, match=says):
        open_validation(run, open_data(run).pipeline)


def make_empty(folder: Path, like: Path) -> None:
    """A folder of shards whose index names none."""
    folder.mkdir()
    content = json.loads((like / INDEX_FILE).read_text())
    content.pop("checksum")
    for name, dtype in ((SAMPLES_FILE, SAMPLE_DTYPE), (IMAGES_FILE, IMAGE_DTYPE)):
        np.save(folder / name, np.zeros(0, dtype))
        content["files"][name] = {"size": (folder / name).stat().st_size, "sha256": hash_file(folder / name)}
    content |= {"num_samples": 0, "num_images": 0, "shards": []}
    (folder / INDEX_FILE).write_text(sign(json.dumps(content, indent=1)))
