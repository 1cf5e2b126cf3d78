"""A model under any tensor and pipeline layout, asked for all that it computes on one case."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.errors import UserError
from megatron_nvlm.evaluation.score_cases import Case, to_micro_batch
from megatron_nvlm.hf.adapters import adapter_rows
from megatron_nvlm.hf.config_json import cross_attention_of, variant_of
from megatron_nvlm.hf.load_weights import load_folder_weights
from megatron_nvlm.hf.weight_tables import nvlm_rows
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.models.config import ModelConfig, ResolvedModel, check_model, resolve_model
from megatron_nvlm.models.families.config_file import read_config
from megatron_nvlm.models.initialise import named_parameters, split_of
from megatron_nvlm.models.language_model import TargetLosses
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.precision import find_precision
from megatron_nvlm.models.sharding import Split, gather_parts, join
from megatron_nvlm.models.weight_rows import convert_to_theirs
from megatron_nvlm.ops.pixel_shuffle import pixel_shuffle
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import get_groups, start_groups, world_size_from_environment
from megatron_nvlm.runs.components import make_chunks, open_weights
from megatron_nvlm.runs.export_run import open_run
from megatron_nvlm.runs.start import Start
from megatron_nvlm.training.step import run_step, wrap_model


@dataclasses.dataclass(frozen=True)
class Scored:
    """What is asked."""

    resolved: ResolvedModel
    chunks: ModelChunks
    wrapped: list[Any]
    """With gradient buffers."""
    device: torch.device

    @property
    def model(self) -> NVLMModel:
        """This rank's stage."""
        return next(iter(self.chunks))


def open_scored(checkpoint: Path | None, folder: Path | None, tensor: int, pipeline: int, precision: str) -> Scored:
    """Load from a checkpoint, or straight from a Hugging Face folder; every rank calls it.

    Raises:
        UserError: the layout is impossible, or there is no such model.
    """
    parallelism = ParallelismConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    if tensor * pipeline != world_size_from_environment():
        raise UserError(
            f"{world_size_from_environment()} ranks cannot be tensor-parallel {tensor} x pipeline-parallel {pipeline}; "
            "start the command without a launcher, it starts its ranks itself"
        )
    path = None
    if checkpoint is not None:
        run, path = open_run(checkpoint)
        config = run.model
    else:
        assert folder is not None
        config = _config_of(folder)
    model = resolve_model(config)
    check_model(model, parallelism)
    weights = open_weights(model) if path is None else None  # a run's checkpoint has taken its folders' weights
    device = use_device()
    if not dist.is_initialized():
        start_groups(parallelism, device, seed=1)
    numbers = find_precision(precision)
    start = Start(None, path, weights, keep_schedule=False, new_order=False)
    chunks = make_chunks(model, parallelism, numbers, device.torch_device, seed=1, is_loaded=start.loads)
    if path is not None:
        save_load.load_model(path, chunks)
    if weights is not None:
        load_folder_weights(chunks, weights)
    return Scored(model, chunks, wrap_model(chunks, numbers, use_distributed_optimizer=False), device.torch_device)


def _config_of(folder: Path) -> ModelConfig:
    described = read_config(folder)
    variant, cross = variant_of(described, folder), cross_attention_of(described, folder)
    return ModelConfig(variant.name, str(folder), str(folder), cross_attention=cross, weights=str(folder))


def score_case(scored: Scored, case: Case, gradients: bool) -> dict[str, Tensor]:
    """All outputs of a case, on rank 0; every rank calls it."""
    parts = scored.resolved
    has_context = parts.variant.needs_cross_attention
    batch = to_micro_batch(case, parts.vision.tokens_per_tile, parts.vision.tile_size, has_context)
    if batch.tokens.max() >= parts.language.vocab_size:
        raise UserError(f"{case.name}.input_ids goes to {int(batch.tokens.max())}, over the model's vocabulary")
    if gradients and not case.has_labels:
        raise UserError(f"{case.name} has no labels, so there is no loss to take gradients of")
    model = scored.model
    seen: dict[str, Tensor] = {}
    _watch(model, seen)
    try:
        result = run_step(scored.wrapped, iter([batch]), 1, scored.device, None)
    finally:
        for name in WATCHED:
            model.__dict__.pop(name, None)
        model.language_model.__dict__.pop("loss", None)
    outputs = _outputs(scored, case, seen)
    if case.has_labels and model.post_process:
        outputs["loss"] = torch.tensor([result.loss_sum / result.num_targets])
    found = _on_rank_0(outputs)
    if gradients:
        found |= {f"grad.{name}": tensor for name, tensor in _gradients(scored).items()}
    return found


WATCHED = ("encode_patches", "project")
"""Methods of the model whose results are outputs."""


def _watch(model: NVLMModel, seen: dict[str, Tensor]) -> None:
    """Keep what passes through: features and vision tokens on the first stage, logits on the last."""

    def keep(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def kept(*arguments: Any, **options: Any) -> Tensor:
            seen[name] = function(*arguments, **options)
            return seen[name]

        return kept

    for name in WATCHED:
        setattr(model, name, keep(name, getattr(model, name)))
    loss = model.language_model.loss

    def loss_beside_logits(hidden: Tensor, *arguments: Any) -> TargetLosses:
        with torch.no_grad():  # the loss projects its targets alone
            seen["logits"] = model.logits(hidden)
        return loss(hidden, *arguments)

    setattr(model.language_model, "loss", loss_beside_logits)  # noqa: B010  (a method, which mypy lets nobody assign)


def _outputs(scored: Scored, case: Case, seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this rank has of the outputs, under their names; tensor-parallel parts of the logits joined."""
    model = scored.model
    outputs: dict[str, Tensor] = {}
    if "encode_patches" in seen:
        outputs["vit_features"] = seen["encode_patches"]
        outputs["pixel_shuffled"] = pixel_shuffle(seen["encode_patches"])
        tokens_per_tile = scored.resolved.vision.tokens_per_tile
        outputs["mlp1_out"] = seen["project"].view(-1, tokens_per_tile, seen["project"].shape[-1])
    if model.post_process:
        logits = join(gather_parts(seen["logits"], get_groups().tp), Split(1, padding=model.vocabulary))
        padded = logits.new_zeros(*case.real.shape, logits.shape[-1])
        padded[case.real.to(padded.device)] = logits
        outputs["logits"] = padded
    return {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in outputs.items()}


def _on_rank_0(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of all stages together."""
    collected: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(collected, outputs)
    return {name: tensor for found in reversed(collected) for name, tensor in found.items()}


def _gradients(scored: Scored) -> dict[str, Tensor]:
    """Gradients of the mean loss over its targets, whole, under Hugging Face names."""
    group = get_groups().tp
    ours: dict[str, Tensor] = {}
    for name, parameter in named_parameters(scored.chunks):
        gradient = parameter.main_grad  # type: ignore[attr-defined]
        split = split_of(name, scored.chunks)
        ours[name] = (gradient if split is None else join(gather_parts(gradient, group), split)).float().cpu().clone()
    whole = _on_rank_0(ours)
    parts = scored.resolved
    rows = nvlm_rows(parts.variant, parts.language, parts.vision, parts.config.cross_attention)
    if parts.config.lora.rank:
        rows += adapter_rows(parts.language, parts.config.lora.targets)
    return convert_to_theirs(rows, whole)


def write_outputs(path: Path, outputs: dict[str, Tensor]) -> None:
    """All outputs in one safetensors file; UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error})") from error
