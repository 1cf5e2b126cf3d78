"""A checkpoint of a run to a Hugging Face folder."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.checkpoint.integrity import IDENTITY_FILE
from megatron_nvlm.checkpoint.stream_files import CheckpointWeights
from megatron_nvlm.checkpoint.tensor_source import TensorSource
from megatron_nvlm.config.load import load_run
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.adapters import ADAPTER_FILE, AdaptersOnly, WithoutAdapters, write_adapter_config
from megatron_nvlm.hf.companions import auto_map, image_context_token_id, write_code, write_companions
from megatron_nvlm.hf.config_json import describe_folder
from megatron_nvlm.hf.convert import Done, begin, cast, export_source, finish, write_export
from megatron_nvlm.hf.our_model import describe_our_model
from megatron_nvlm.hf.safetensors_files import write_file
from megatron_nvlm.models.config import ResolvedModel, resolve_model
from megatron_nvlm.models.families.config_file import CONFIG_FILE
from megatron_nvlm.models.families.visions import vision_family_of
from megatron_nvlm.models.lora import LoraConfig
from megatron_nvlm.runs.components import make_identity
from megatron_nvlm.runs.model_card import CARD_FILE, read_scores, step_of, write_card
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.text.tokenizer import Tokenizer

ADAPTERS_OF_EXPORT = ("merged", "without", "alone")
"""Weights with the adapters in them, weights as if there were none, or the adapters as PEFT reads them."""


def open_run(path: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Path]:
    """The run that a checkpoint belongs to, and the checkpoint's folder; UserError if either is missing."""
    checkpoint = save_load.find_checkpoint(path)
    config = RunDir(checkpoint.parents[1]).config
    if not config.is_file():
        raise UserError(f"{checkpoint} does not lie in the folder of a run: there is no {config}; keep them together")
    return load_run(config, overrides), checkpoint


def export_folder(
    path: Path,
    out: Path,
    overrides: Sequence[str],
    dtype: torch.dtype | None,
    most_bytes: int,
    progress: Callable[[TensorSource], Done],
    adapters: str = "merged",
    report: Path | None = None,
) -> str:
    """Write the folder; returns a sentence of what was made.

    Args:
        path: a run's folder or a checkpoint. dtype: of the weights; None keeps the checkpoint's.
        adapters: what becomes of low-rank adapters (ADAPTERS_OF_EXPORT).
        report: a report.json of run_benchmarks, whose scores go into the model card.

    Raises:
        UserError: with what is wrong and how to fix it. CensusError: names or shapes that do not match.
    """
    run, checkpoint = open_run(path, overrides)
    model = resolve_model(run.model)
    tokenizer = _find_tokenizer(run, checkpoint)
    save_load.check_identity(checkpoint, make_identity(run, model, Tokenizer.load(tokenizer) if tokenizer else None))
    card = write_card(run, checkpoint, read_scores(report, checkpoint, step_of(checkpoint)) if report else ())
    mark = {
        "checkpoint": str(checkpoint.resolve()),
        "identity": (checkpoint / IDENTITY_FILE).read_text(),
        "dtype": str(dtype),
        "bytes": most_bytes,
        "adapters": adapters,
        "model": dataclasses.asdict(run.model),
    }
    ours: TensorSource = CheckpointWeights(checkpoint)
    if adapters == "alone":
        return _export_adapters(model, ours, out, dtype, mark, progress)
    if run.model.lora.rank:
        ours = WithoutAdapters(ours, model.language, run.model.lora, merged=adapters == "merged")
        model = dataclasses.replace(model, config=dataclasses.replace(run.model, lora=LoraConfig()))
    source = export_source(model, ours, describe_our_model(model), dtype, str(checkpoint))
    types = {str(info.dtype).removeprefix("torch.") for info in source.infos.values()}
    config = _config(run, model, tokenizer, types.pop() if len(types) == 1 else "float32")

    def write_others(folder: Path) -> None:
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        (folder / CARD_FILE).write_text(card)
        tiling, data = run.tiling, run.data
        if tokenizer is None:
            write_code(folder, vision_family_of(model.vision).exported_class)
            return
        write_companions(folder, config, tokenizer, data.template, data.system, tiling)

    write_export(out, source, write_others, mark, progress(source), most_bytes)
    count = sum(info.parameters for info in source.infos.values())
    missing = (
        "" if tokenizer else "; without tokenizer and processor, since the weights came without: give data.tokenizer="
    )
    return f"{out}: NVLM-{run.model.variant.upper()}, {len(source.infos)} tensors, {count:,} numbers{missing}"


def _export_adapters(
    model: ResolvedModel,
    ours: TensorSource,
    out: Path,
    dtype: torch.dtype | None,
    mark: dict[str, Any],
    progress: Callable[[TensorSource], Done],
) -> str:
    """A folder that PEFT reads beside an export without adapters."""
    lora = model.config.lora
    if not lora.rank:
        raise UserError(
            f"{mark['checkpoint']} is of a run without model.lora, so it has no adapters; leave out --adapters"
        )
    source = cast(AdaptersOnly(ours, model.language, lora), dtype)
    partial = begin(out, mark)
    write_file(partial / ADAPTER_FILE, source.infos, source.read, progress(source))
    write_adapter_config(partial, lora, None)
    finish(partial, out)
    count = sum(info.parameters for info in source.infos.values())
    return f"{out}: adapters of rank {lora.rank} for an export with --adapters without, {count:,} numbers"


def _find_tokenizer(run: RunConfig, checkpoint: Path) -> Path | None:
    """The run's tokenizer; None if its weights were imported without one."""
    path = Path(run.data.tokenizer)
    if path.is_file():
        return path
    if save_load.read_identity(checkpoint).tokenizer:
        raise UserError(f"there is no tokenizer at {path}; give data.tokenizer=FILE after the options")
    return None


def _config(run: RunConfig, model: ResolvedModel, tokenizer: Path | None, dtype: str) -> dict[str, Any]:
    config = describe_folder(model, run.tiling, run.data.template, dtype)
    config["auto_map"] = auto_map(run.model.variant)
    place = image_context_token_id(tokenizer, model.language.vocab_size) if tokenizer else None
    return config if place is None else {**config, "img_context_token_id": place}
