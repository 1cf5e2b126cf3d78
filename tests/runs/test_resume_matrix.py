"""Every key of a run file, changed between two starts of a real run: seen in its metrics or files, refused, or listed.

Some sixty starts of a few seconds each, so most of it runs at night.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.runs.changes import EFFECTS, Effect
from tests.support.launch import launch
from tests.support.shards import good_samples, read_metrics, write_run, write_samples

pytestmark = pytest.mark.distributed

TRAIN = "megatron_nvlm.train"
STEPS, MORE_STEPS = 4, 7
NOISE = 1e-4
"""Relative; sums in another order differ by less."""


@dataclass(frozen=True)
class Start:
    """What a second start of the run left."""

    status: int
    printed: str
    run_dir: Path
    rows: list[dict[str, Any]]
    """Of its own steps."""

    def column(self, name: str) -> list[Any]:
        """A metric over the steps."""
        return [row[name] for row in self.rows]

    def is_listed(self, key: str) -> bool:
        """Whether the key is named among the changed ones."""
        return f"changed since the checkpoint: {key}: " in self.printed


Seen = Callable[[Start, Start], bool]
"""(the start with the changed key, a start without) -> whether its effect is seen."""


def differs(column: str) -> Seen:
    """The metric is another one, by more than rounding."""
    return lambda start, base: start.column(column) != pytest.approx(base.column(column), rel=NOISE)


def has_file(pattern: str) -> Seen:
    """A file appears that was not there without."""
    return lambda start, base: any(start.run_dir.glob(pattern)) and not any(base.run_dir.glob(pattern))


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))


def validations(start: Start) -> list[dict[str, Any]]:
    """What each validation of a start measured, by set."""
    return [row["validation"] for row in start.rows if "validation" in row]


def lines_of_steps(printed: str) -> int:
    return sum(line.startswith("step ") for line in printed.splitlines())


EFFECTIVE: dict[str, tuple[str, Seen]] = {
    "model.attention_dropout": ("0.5", differs("loss")),
    "model.hidden_dropout": ("0.5", differs("loss")),
    "tiling.max_tiles": ("2", differs("tiles")),
    "data.sequence_length": ("91", differs("bad_samples")),
    "data.too_long": ("truncate", differs("truncated")),
    "data.system": ("Other words.", differs("tokens")),
    "data.ledger": ("true", has_file("ledger.jsonl")),
    "optimizer.clip_grad": ("0.01", differs("loss")),
    "optimizer.max_lr": ("0.01", differs("learning_rate")),
    "optimizer.min_lr": ("0.0009", differs("learning_rate")),
    "optimizer.warmup_steps": ("5", differs("learning_rate")),
    "optimizer.decay_steps": ("20", differs("learning_rate")),
    "optimizer.schedule": ("linear", differs("learning_rate")),
    "optimizer.component_lr": ("{vision_projection: 3}", differs("loss")),
    "optimizer.adam_beta1": ("0.2", differs("loss")),
    "optimizer.adam_beta2": ("0.2", differs("loss")),
    "optimizer.adam_eps": ("0.1", differs("loss")),
    "optimizer.weight_decay": ("100", differs("loss")),
    "training.global_batch_size": ("8", differs("samples")),
    "training.epochs": ("1.5", lambda start, base: len(start.rows) == 9 - STEPS != len(base.rows)),
    "parallelism.tensor_model_parallel_size": ("2", differs("tiles_per_rank")),
    "recipe.trainable": ("[vision_projection]", differs("grad_norm")),
    "checkpoint.save_every_steps": (
        "10",
        lambda start, base: checkpoints(start.run_dir) != checkpoints(base.run_dir),
    ),
    "checkpoint.keep_last": ("1", lambda start, base: len(checkpoints(start.run_dir)) < len(checkpoints(base.run_dir))),
    "checkpoint.keep_every_steps": (
        "2",
        lambda start, base: len(checkpoints(start.run_dir)) > len(checkpoints(base.run_dir)),
    ),
    "checkpoint.keep_schedule": ("true", differs("learning_rate")),
    "logging.log_every_steps": (
        "2",
        lambda start, base: lines_of_steps(start.printed) < lines_of_steps(base.printed),
    ),
    "logging.tensorboard": ("true", has_file("**/events.out.tfevents*")),
    "logging.rank_files": ("true", has_file("logs/*")),
    "validation.sets": ("[{path: OTHER}]", lambda start, base: len(validations(start)) == 1 > len(validations(base))),
    "validation.every_steps": ("1", lambda start, base: len(validations(start)) == MORE_STEPS - STEPS),
    "validation.samples": ("3", lambda start, base: sum(row["samples"] for row in validations(start)[0].values()) == 3),
    "logging.peak_tflops": (
        "0.5",
        lambda start, base: all("mfu" in row for row in start.rows) > ("mfu" in base.rows[0]),
    ),
    "training.profile": ("6-7", has_file("profile/steps_6-7_rank_00000.json.gz")),
}
"""Keys whose new value is seen, and where."""

ON_TWO_RANKS = ("parallelism.tensor_model_parallel_size", "logging.rank_files")

BESIDE = {
    "data.too_long": ["data.sequence_length=91"],
    "data.sequence_length": ["data.max_bad_fraction=1"],
    "training.epochs": ["training.train_steps=null"],
    "validation.every_steps": ["validation.sets=[{path: OTHER}]"],
    "validation.samples": ["validation.sets=[{path: OTHER}]"],
}
"""What else a key needs, so that its effect does not end the run."""

SAME_NUMBERS: dict[str, str] = {
    "model.recompute": "full",
    "data.tokenizer": "COPY",
    "data.valid": "SHARDS",
    "data.num_workers": "1",
    "data.prefetch_samples": "4",
    "data.max_bad_fraction": "0.5",
    "data.cache.folder": "CACHE",
    "data.cache.limit_gb": "1",
    "data.cache.retries": "1",
    "training.micro_batch_size": "2",
    "training.timeout_seconds": "100",
    "training.start_timeout_seconds": "200",
    "training.save_timeout_seconds": "200",
    "training.device": "cpu",
    "training.profile_ranks": "[]",
    "parallelism.payload_vision_tokens": "64",
    "parallelism.vision_placement": "replicated",
    "parallelism.vision_tiles_at_once": "1",
    "recipe.name": "pretrain",
    "checkpoint.asynchronous": "false",
    "checkpoint.verify": "checksum",
    "checkpoint.allow_changes": "[data.seed]",
    "stability.max_skipped": "1",
    "stability.window_steps": "50",
    "stability.grad_norm_spike": "1000",
    "stability.loss_spike": "1000",
    "logging.straggler_steps": "3",
    "validation.text_margin": "9",
}
"""Keys by which the same numbers are computed in another way: all in one start. (The recipe lists its components.)"""

LAYOUTS: dict[str, tuple[str, ...]] = {
    "parallelism.sequence_parallel": ("true", "parallelism.tensor_model_parallel_size=2"),
    "parallelism.pipeline_model_parallel_size": ("2",),
    "parallelism.virtual_pipeline_model_parallel_size": (
        *("2", "parallelism.pipeline_model_parallel_size=2", "parallelism.payload_vision_tokens=512"),
    ),
    "parallelism.pipeline_layout": ("Et|tttL", "parallelism.pipeline_model_parallel_size=2"),
}
"""Keys of the layout: value, and what it needs beside it, on two ranks."""

REFUSED: dict[str, tuple[str, str]] = {
    "model.variant": ("x", "is of NVLM 'h' and this run is of 'x'"),
    "model.language": ("tiny_qwen3", "tiny_qwen3"),
    "model.vision": ("tiny_siglip", "tiny_siglip encodes tiles of 70"),
    "model.backend": ("te", "model.backend is"),
    "model.max_sequence_length": ("200", "data.sequence_length 256 is over model.max_sequence_length 200"),
    "parallelism.context_parallel_size": ("2", "parallelism.context_parallel_size over 1 is refused"),
    "parallelism.expert_model_parallel_size": ("2", "parallelism.expert_model_parallel_size over 1 is refused"),
    "tiling.tile_size": ("448", "tiling.tile_size is 448"),
    **{
        key: (value, f"{key} ")
        for key, value in {
            "model.cross_attention.interval": "4",
            "model.cross_attention.offset": "0",
            "model.cross_attention.num_attention_heads": "2",
            "model.cross_attention.num_query_groups": "1",
            "model.cross_attention.qk_norm": "true",
            "parallelism.use_distributed_optimizer": "false",
            "tiling.tag_format": "none",
            "tiling.thumbnail_tag": "<whole>",
            "tiling.background": "white",
            "data.template": "plain",
            "training.precision": "bf16",
            "data.seed": "5",
            "data.shuffle_window_shards": "1",
        }.items()
    },
    "model.lora.rank": ("4", "model.lora.rank gives it adapters that train instead"),
    "data.train": ("[{path: OTHER}]", "data.train give another order of samples"),
    "data.packing.enabled": ("true", "data.packing.enabled"),
}
"""Keys whose change is refused: value, and part of the sentence."""

WITHOUT_EFFECT: dict[str, str] = {
    "model.init_std": "1",
    "training.seed": "77",
    "model.cross_attention.gate_init": "0.5",
    "checkpoint.initial_weights": "COPY_OF_RUN",
}
"""Keys that only new weights read, all in one start."""

TRACKERS = "of packages that are not required: tests/trackers/test_sender.py"
ELSEWHERE = {
    "optimizer.wsd_decay_steps": "of schedule wsd alone: tests/training/test_schedules.py",
    "optimizer.wsd_decay_style": "of schedule wsd alone: tests/training/test_schedules.py",
    "run_dir": "each start here has another one",
    "training.train_steps": "each start here has more",
    "data.packing.window_samples": "counts with packing alone: tests/runs/test_changes.py",
    "logging.wandb.project": TRACKERS,
    "logging.wandb.name": TRACKERS,
    "logging.wandb.mode": TRACKERS,
    "logging.mlflow.uri": TRACKERS,
    "logging.mlflow.experiment": TRACKERS,
    "model.lora.alpha": "of adapters alone: tests/runs/test_lora.py",
    "model.lora.dropout": "of adapters alone: tests/runs/test_lora.py",
    "model.lora.targets": "of adapters alone: tests/runs/test_lora.py",
    "model.weights": "without effect as checkpoint.initial_weights, beside which it is refused",
    "model.language_weights": "as model.weights",
    "model.vision_weights": "as model.weights",
}


def test_no_key_is_left_out() -> None:
    tables = [EFFECTIVE, SAME_NUMBERS, LAYOUTS, REFUSED, WITHOUT_EFFECT, ELSEWHERE]
    assert {key for table in tables for key in table} == set(EFFECTS)
    assert sum(map(len, tables)) == len(EFFECTS), "a key stands in two tables"
    assert all(EFFECTS[key] is Effect.NEW_WEIGHTS for key in WITHOUT_EFFECT)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a run that has made its steps."""
    folder = tmp_path_factory.mktemp("matrix")
    write_samples(folder / "other", good_samples(9))
    path = write_run(folder, training={"train_steps": STEPS, "micro_batch_size": 1})
    shutil.copyfile(folder / "tokenizer.json", folder / "again.json")
    launch(TRAIN, 1, "--config", str(path))
    shutil.copytree(folder / "run", folder / "copy")
    return path


def go_on(run_file: Path, run_dir: Path, *overrides: str, ranks: int = 1) -> Start:
    folder = run_file.parent
    shutil.copytree(folder / "run", run_dir)
    names = {
        "=COPY_OF_RUN": f"={folder}/copy",
        "=COPY": f"={folder}/again.json",
        "=SHARDS": f"={folder}/shards",
        "=CACHE": f"={folder}/cache",
        "path: OTHER": f"path: {folder}/other",
    }
    given = list(overrides)
    for name, value in names.items():
        given = [override.replace(name, value) for override in given]
    keys = [f"run_dir={run_dir}", f"training.train_steps={MORE_STEPS}", *given]
    done = launch(TRAIN, ranks, "--config", str(run_file), *keys, check=False)
    return Start(done.returncode, done.stdout + done.stderr, run_dir, read_metrics(run_dir)[STEPS:])


@pytest.fixture(scope="module")
def base(run_file: Path) -> Start:
    """The run gone on with more steps alone."""
    start = go_on(run_file, run_file.parent / "base")
    assert start.status == 0 and len(start.rows) == MORE_STEPS - STEPS, start.printed
    return start


@pytest.mark.slow
@pytest.mark.parametrize("key", EFFECTIVE)
def test_takes_effect(run_file: Path, base: Start, tmp_path: Path, key: str) -> None:
    value, is_seen = EFFECTIVE[key]
    ranks = 2 if key in ON_TWO_RANKS else 1
    start = go_on(run_file, tmp_path / "run", f"{key}={value}", *BESIDE.get(key, []), ranks=ranks)
    assert start.status == 0 and start.is_listed(key), start.printed
    assert is_seen(start, base)


@pytest.mark.slow
def test_same_numbers_in_another_way(run_file: Path, base: Start, tmp_path: Path) -> None:
    start = go_on(run_file, tmp_path / "run", *(f"{key}={value}" for key, value in SAME_NUMBERS.items()))
    assert start.status == 0, start.printed
    assert start.column("loss") == pytest.approx(base.column("loss"), rel=NOISE)
    assert [key for key in SAME_NUMBERS if not start.is_listed(key)] == []


@pytest.mark.slow
@pytest.mark.parametrize("key", LAYOUTS)
def test_another_layout_computes_the_same(run_file: Path, base: Start, tmp_path: Path, key: str) -> None:
    value, *needed = LAYOUTS[key]
    start = go_on(run_file, tmp_path / "run", f"{key}={value}", *needed, ranks=2)
    assert start.status == 0 and start.is_listed(key), start.printed
    assert start.column("loss") == pytest.approx(base.column("loss"), rel=NOISE)


@pytest.mark.slow
@pytest.mark.parametrize("key", REFUSED)
def test_is_refused_by_name(run_file: Path, tmp_path: Path, key: str) -> None:
    value, sentence = REFUSED[key]
    start = go_on(run_file, tmp_path / "run", f"{key}={value}")
    assert start.status != 0 and start.rows == []
    errors = [line for line in start.printed.splitlines() if "error: " in line]
    assert errors and sentence in errors[-1], start.printed


@pytest.mark.slow
def test_is_said_to_have_no_effect(run_file: Path, base: Start, tmp_path: Path) -> None:
    start = go_on(run_file, tmp_path / "run", *(f"{key}={value}" for key, value in WITHOUT_EFFECT.items()))
    assert start.status == 0 and start.column("loss") == base.column("loss"), start.printed
    listed = [line for line in start.printed.splitlines() if "(of new weights alone, so without effect here)" in line]
    assert [key for key in WITHOUT_EFFECT if not any(f": {key}: " in line for line in listed)] == []
