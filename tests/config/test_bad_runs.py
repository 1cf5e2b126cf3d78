"""What is wrong with a run file is said in one sentence that names the key, before any process talks to another."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.config.load import dump_run, load_run
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.errors import UserError
from megatron_nvlm.models.families.languages import LANGUAGE_PRESETS
from megatron_nvlm.runs.resolve import resolve_run

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = CONFIGS / "demo_h.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_file_survives_writing_and_reading(path: Path, tmp_path: Path) -> None:
    run = load_run(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_run(run))
    assert load_run(copy) == run


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.max_lrr=1", r"unknown key optimizer.max_lrr; did you mean optimizer.max_lr\?"),
        ("modle.variant=h", r"unknown key modle; did you mean model\?"),
        ("data.train.0.wight=1", r"unknown key data.train.0.wight; did you mean data.train.0.weight\?"),
        ("training.train_steps=many", "training.train_steps has a value of the wrong type"),
        ("training", "is no override; write section.key=value"),
        ("model.variant=z", "model.variant is 'z'; choose one of d, x, h"),
        ("model.language=qwen", "model.language is 'qwen', which is no preset and no folder; choose one of qwen2_72b"),
        ("model.backend=cuda", "model.backend is 'cuda'; choose one of local, te"),
        ("model.recompute=all", "model.recompute is 'all'; choose one of none, selective, full"),
        ("model.cross_attention.interval=9", "gives no cross-attention layer among the 4 of tiny"),
        ("parallelism.tensor_model_parallel_size=4", "which does not divide the 2 query groups of the language model"),
        ("parallelism.pipeline_model_parallel_size=8", "more than the 4 layers of the language model"),
        ("parallelism.pipeline_model_parallel_size=3", "which does not divide the 4 layers"),
        ("parallelism.sequence_parallel=true", "needs parallelism.tensor_model_parallel_size of at least 2"),
        ("tiling.tile_size=448", "tiny encodes tiles of 56"),
        ("tiling.max_tiles=0", "tiling.max_tiles is 0; it must be at least 1"),
        ("tiling.tag_format=3d", "tiling.tag_format is '3d'; choose one of none, 1d, 2d_grid, 2d_box"),
        ("logging.peak_tflops=0", "logging.peak_tflops is 0.0; it must be above 0"),
        ("training.profile=soon", "training.profile is 'soon'; give a step, as 12, or a first and a last one"),
        ("training.profile=12-10", "training.profile is '12-10'; give a step"),
        ("training.profile=2000-2001", "begins at step 2000 and training.train_steps is 1000"),
        (
            "training={profile: 3, profile_ranks: [4]}",
            r"training.profile_ranks names rank 4 and the run has ranks 0 to",
        ),
        ("training={profile: 3, profile_ranks: []}", "training.profile_ranks is empty; name at least one rank"),
        ("data.packing.enabled=true", "set training.micro_batch_size=1, not"),
        ("data.packing.window_samples=0", "data.packing.window_samples is 0; it must be at least 1"),
        ("data.shuffle_window_shards=0", "data.shuffle_window_shards is 0; it must be at least 1"),
        ("data.max_bad_fraction=2", "data.max_bad_fraction is 2.0; it must lie between 0 and 1"),
        ("data.num_workers=-1", "data.num_workers is -1; it must be at least 0"),
        ("data.cache.limit_gb=0", "data.cache.limit_gb is 0.0; it must be above 0"),
        ("training.global_batch_size=33", "no multiple of training.micro_batch_size"),
        ("training.epochs=2", "training.train_steps is 1000 and training.epochs is 2.0; give one of them"),
        ("training.train_steps=null", "training.train_steps is null and training.epochs is null; give one of them"),
        ("training={train_steps: null, epochs: 0}", "training.epochs is 0.0; it must be a number above 0"),
        ("optimizer.component_lr={vision: 2}", "optimizer.component_lr names vision; the components are vision_model,"),
        (
            "optimizer.component_lr={language_model: 0}",
            "component_lr.language_model is 0.0; it must be a number above 0",
        ),
        ("optimizer.component_lr={language_model: .inf}", "component_lr.language_model is inf; it must be a number"),
        ("training.device=gpu", "training.device is 'gpu'; choose one of auto, cpu, cuda"),
        ("training.precision=fp8", "training.precision is 'fp8'"),
        ("data.sequence_length=9000", "data.sequence_length 9000 is over model.max_sequence_length"),
        ("data.template=alpaca", "data.template is 'alpaca'"),
        ("recipe.name=warmup", "recipe.name is 'warmup'; choose one of pretrain, sft"),
        ("recipe.trainable=[vision]", "name at least one of vision_model"),
        ("optimizer.min_lr=1", "optimizer.min_lr 1.0 must lie between 0 and optimizer.max_lr"),
        ("optimizer.warmup_steps=100000", "must be fewer than"),
        ("optimizer.max_lr=.inf", "optimizer.max_lr inf, a finite number"),
        ("optimizer.decay_steps=0", "optimizer.decay_steps is 0; it must be at least 1, or null"),
        ("model.init_std=-1", "model.init_std is -1.0; it must be above 0"),
        ("data.too_long=cut", "data.too_long is 'cut'; choose one of reject, truncate"),
        ("tiling.background=clear", "tiling.background is 'clear', which is no opaque colour"),
        ("optimizer.schedule=wsd", "optimizer.wsd_decay_steps is None; schedule wsd needs"),
        ("optimizer.adam_beta2=1.0", "optimizer.adam_beta2 is 1.0; it must be at least 0 and below 1"),
        ("optimizer.adam_eps=0", "optimizer.adam_eps is 0.0; it must be above 0"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay is -0.1; it must be 0 or a positive number"),
        ("optimizer.clip_grad=.nan", "optimizer.clip_grad is nan; it must be 0 for none, or a positive number"),
        ("model.hidden_dropout=1.5", "model.hidden_dropout is 1.5; it must be at least 0 and below 1"),
        ("model.lora.rank=-1", "model.lora.rank is -1; it must be at least 1, or 0 for no adapters"),
        ("recipe.trainable=[lora]", "recipe.trainable names lora and model.lora.rank is 0"),
        ("checkpoint.save_every_steps=0", "checkpoint.save_every_steps is 0"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last is 0"),
        ("checkpoint.keep_every_steps=0", "checkpoint.keep_every_steps is 0"),
        ("checkpoint.verify=hash", "checkpoint.verify is 'hash'; choose one of size, checksum"),
        ("logging.log_every_steps=0", "logging.log_every_steps is 0"),
        ("logging.wandb.mode=disabled", "logging.wandb.mode is 'disabled'; choose one of online, offline"),
        ("logging.wandb.name=a", "logging.wandb.name is set without logging.wandb.project; give the project as well"),
        ("logging.mlflow.uri=''", "logging.mlflow.uri is empty; give a name, or leave it out"),
        ("logging.wandb.projekt=a", r"unknown key logging.wandb.projekt; did you mean logging.wandb.project\?"),
        ("training.timeout_seconds=0", "training.timeout_seconds is 0"),
        ("training.timeout_seconds=.nan", "training.timeout_seconds is nan; it must be a finite number"),
        ("data.train.0.weight=.nan", "data.train.0.weight is nan; it must be a finite number"),
        ("data.train.0.weight=.inf", "data.train.0.weight is inf; it must be a finite number"),
        ("data.max_bad_fraction=.nan", "data.max_bad_fraction is nan"),
        ("data.cache.limit_gb=.nan", "data.cache.limit_gb is nan"),
        ("stability.max_skipped=-1", "stability.max_skipped is -1; it must be 0 or more"),
        ("stability.loss_spike=1", "stability.loss_spike is 1.0; it must be a number above 1, or null for none"),
        ("logging.straggler_steps=-1", "logging.straggler_steps is -1; it must be 0 for none, or more"),
        ("training.save_timeout_seconds=0", "training.save_timeout_seconds is 0"),
        ("validation.every_steps=0", "validation.every_steps is 0; it must be at least 1"),
        ("validation.samples=0", "validation.samples is 0; it must be at least 1, or null for whole sets"),
        ("validation.text_margin=-1", "validation.text_margin is -1.0; it must be 0 or a positive number"),
        ("validation.set=[]", r"unknown key validation.set; did you mean validation.sets\?"),
        (
            "validation.sets=[{path: a/b, name: c}, {path: a/c/}]",
            "the name 'c' twice .entries 0 and 1.; give one of them",
        ),
        ("validation.sets=[{path: a/b, samples: 0}]", r"validation.sets.0.samples .b. is 0; it must be at least 1, or"),
        ("validation.sets=[{path: /}]", "validation.sets.0 has the path '/', which gives no name; give it a name"),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, says: str) -> None:
    single = "parallelism.tensor_model_parallel_size=1"
    with pytest.raises(UserError, match=says):
        resolve_run(load_run(DEMO, [single, override]), world_size=1)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_transformer_engine_is_refused_where_it_has_no_kernel_of_attention(precision: str) -> None:
    single = ["parallelism.tensor_model_parallel_size=1", "model.backend=te"]
    with pytest.raises(UserError, match=f"model.backend is te and training.precision is {precision}, in which"):
        resolve_run(load_run(DEMO, [*single, f"training.precision={precision}"]), world_size=1)
    resolve_run(load_run(DEMO, [*single, "training.precision=bf16"]), world_size=1)
    with pytest.raises(UserError, match="model.backend is te and training.device is cpu; set model.backend=local"):
        resolve_run(load_run(DEMO, [*single, "training.device=cpu"]), world_size=1)


@pytest.mark.parametrize(
    ("overrides", "component"),
    [(["recipe.trainable=[vision_projection]"], "language_model"), (["model.variant=d"], "cross_attention")],
)
def test_a_rate_of_what_does_not_train_is_refused(overrides: list[str], component: str) -> None:
    own = f"optimizer.component_lr={{{component}: 2}}"
    with pytest.raises(UserError, match=f"component_lr names {component}, which does not train in this run"):
        resolve_run(load_run(DEMO, ["parallelism.tensor_model_parallel_size=1", *overrides, own]), world_size=1)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["recipe.trainable=[language_model]"], "recipe.trainable names language_model, and model.lora.rank gives it"),
        (["recipe={name: pretrain, trainable: null}"], "recipe.name pretrain does not train them; set recipe.name=sft"),
        (["model.lora.targets=[qkv]"], "model.lora.targets is"),
        (["model.lora.dropout=0.1", "parallelism.tensor_model_parallel_size=2"], "dropout with tensor or pipeline"),
    ],
)
def test_adapters_that_cannot_train_are_refused(overrides: list[str], says: str) -> None:
    keys = ["parallelism.tensor_model_parallel_size=1", "model.lora.rank=4", "recipe.trainable=null", *overrides]
    with pytest.raises(UserError, match=says):
        resolve_run(load_run(DEMO, keys), world_size=2)


def test_recipe_sft_trains_adapters_instead_of_the_language_model() -> None:
    keys = ["parallelism.tensor_model_parallel_size=1", "model.lora.rank=4", "recipe={name: sft, trainable: null}"]
    assert resolve_run(load_run(DEMO, keys), 1).trainable == ("vision_projection", "cross_attention", "lora")


def test_something_must_train() -> None:
    overrides = ["parallelism.tensor_model_parallel_size=1", "model.variant=d", "recipe.trainable=[cross_attention]"]
    with pytest.raises(UserError, match="NVLM-D has no cross-attention, so nothing would train"):
        resolve_run(load_run(DEMO, overrides), world_size=1)


def test_ranks_must_be_whole_replicas() -> None:
    with pytest.raises(UserError, match="3 ranks cannot be divided into model replicas of 2"):
        resolve_run(load_run(DEMO), world_size=3)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["pipeline_layout=Ett|ttx"], r"may hold E, t, L, \| and repeats such as t\*8 only"),
        (["pipeline_layout=Et|t|ttL"], "has 3 parts and the pipeline has 2"),
        (["pipeline_layout=Et|t*4L"], "has 5 layers and the language model has 4"),
        (["pipeline_layout=tt|ttL"], "must begin with E and end with L, each once"),
        (["pipeline_layout=E|t*4L"], "leaves part 1 without a layer"),
        (
            ["virtual_pipeline_model_parallel_size=4"],
            "x virtual_pipeline_model_parallel_size 4, more than the 4 layers",
        ),
        (["virtual_pipeline_model_parallel_size=0"], "virtual_pipeline_model_parallel_size must be at least 1"),
        (["virtual_pipeline_model_parallel_size=2", "pipeline_model_parallel_size=1"], "is 2 without a pipeline"),
        (["virtual_pipeline_model_parallel_size=2"], "payload_vision_tokens is 0 and NVLM-H sends vision tokens"),
    ],
)
def test_a_pipeline_that_cannot_be_is_named(overrides: list[str], says: str) -> None:
    keys = ["tensor_model_parallel_size=1", "pipeline_model_parallel_size=2", *overrides]
    with pytest.raises(UserError, match=says):
        resolve_run(load_run(DEMO, [f"parallelism.{key}" for key in keys]), world_size=2)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "parallelism.context_parallel_size=2",
            "parallelism.context_parallel_size over 1 is refused: the interval masks",
        ),
        ("parallelism.expert_model_parallel_size=2", "is refused: no language model among the presets has experts"),
        ("model.hidden_dropout=0.1", "dropout with tensor or pipeline parallelism is refused"),
        ("model.attention_dropout=0.1", "dropout with tensor or pipeline parallelism is refused"),
        ("parallelism.vision_placement=everywhere", "choose one of first_stage, replicated, tensor_parallel"),
        ("parallelism.vision_tiles_at_once=0", "parallelism.vision_tiles_at_once is 0; it must be at least 1"),
    ],
)
def test_what_no_test_proves_is_refused(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        resolve_run(load_run(DEMO, [override]), world_size=2)


def test_tied_embeddings_are_refused_in_a_pipeline_with_the_distributed_optimizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(LANGUAGE_PRESETS, "tiny", dataclasses.replace(LANGUAGE_PRESETS["tiny"], tied_embeddings=True))
    pipeline = "parallelism.pipeline_model_parallel_size=2"
    with pytest.raises(UserError, match="tied embeddings in a pipeline with the distributed optimizer is refused"):
        resolve_run(load_run(DEMO, [pipeline, "parallelism.use_distributed_optimizer=true"]), world_size=4)
    resolve_run(load_run(DEMO, [pipeline, "parallelism.use_distributed_optimizer=false"]), world_size=4)


def test_virtual_stages_need_micro_batches_in_groups() -> None:
    keys = ["tensor_model_parallel_size=1", "pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"]
    overrides = [f"parallelism.{key}" for key in keys]
    with pytest.raises(UserError, match="in groups of the 2 pipeline stages, and a step has 3"):
        resolve_run(load_run(DEMO, [*overrides, "training.global_batch_size=48"]), world_size=2)


def test_missing_files_and_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run file"):
        load_run(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        load_run(broken)
    values = yaml.safe_load(DEMO.read_text())
    del values["optimizer"]["max_lr"]
    broken.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="the key optimizer.max_lr is missing"):
        load_run(broken)


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=20))
def test_no_unknown_section_passes(name: str) -> None:
    if name in RunConfig.__dataclass_fields__:
        return
    with pytest.raises(UserError, match=f"unknown key {name};"):
        load_run(DEMO, [f"{name}=1"])
