"""Hugging Face folders to the folder of a run that has made no step: to train from, to ask, to export again."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_nvlm.checkpoint.retention import step_folder, write_latest
from megatron_nvlm.checkpoint.tensor_source import TensorSource
from megatron_nvlm.config.load import dump_run, load_run
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.adapters import AdapterFolder
from megatron_nvlm.hf.config_json import check_whole_folder, cross_attention_of, is_whole_folder, most_tiles_of
from megatron_nvlm.hf.convert import Done, imported_source, write_import
from megatron_nvlm.hf.our_model import describe_our_model
from megatron_nvlm.models.config import resolve_model
from megatron_nvlm.models.families.config_file import CONFIG_FILE, read_config
from megatron_nvlm.models.families.language_json import language_preset_of
from megatron_nvlm.models.families.languages import LANGUAGE_PRESETS
from megatron_nvlm.models.families.presets import name_of
from megatron_nvlm.models.families.visions import VISION_PRESETS, vision_preset_of
from megatron_nvlm.runs.components import make_identity
from megatron_nvlm.text.sentencepiece_model import SENTENCEPIECE_FILE, convert_sentencepiece
from megatron_nvlm.text.templates import TEMPLATES
from megatron_nvlm.text.tokenizer import Tokenizer

STEP = step_folder(0)


@dataclass(frozen=True)
class ImportRequest:
    """What is asked for on the command line."""

    whole: Path | None
    language: Path | None
    vision: Path | None
    variant: str
    out: Path
    tokenizer: Path | None
    dtype: torch.dtype | None
    seed: int
    overrides: tuple[str, ...]
    adapters: Path | None = None
    """A folder as PEFT writes it."""


_TILING_KEYS = ("tag_format", "thumbnail_tag", "background")
"""Of a folder's config.json and of section `tiling` alike."""


def import_folders(request: ImportRequest, progress: Callable[[TensorSource], Done]) -> str:
    """Write the run's folder; returns a sentence of what was made.

    Raises:
        UserError: with what is wrong and how to fix it. CensusError: names or shapes that do not match.
    """
    _check_request(request)
    adapters = AdapterFolder(request.adapters) if request.adapters else None
    run = _describe_run(request, adapters)
    model = resolve_model(run.model)
    ours = describe_our_model(model)
    source = imported_source(model, ours, request.seed, request.dtype, adapters)
    tokenizer = _find_tokenizer(request)
    checkpoint = request.out / "checkpoints" / STEP
    identity = make_identity(run, model, open_tokenizer(tokenizer) if tokenizer else None)
    mark = {
        "model": dataclasses.asdict(run.model),
        "seed": request.seed,
        "dtype": str(request.dtype),
        "lora": str(request.adapters),
    }
    write_import(checkpoint, source, ours, identity, mark, progress(source))
    if tokenizer is not None:
        write_tokenizer(tokenizer, request.out / "tokenizer.json")
    kept = dataclasses.replace(run.model, weights=None, language_weights=None, vision_weights=None)
    (request.out / "config.yaml").write_text(dump_run(dataclasses.replace(run, model=kept)))
    write_latest(checkpoint.parent, checkpoint.name)
    count = sum(info.parameters for info in source.infos.values())
    missing = "" if tokenizer else "; no tokenizer.json was found: give --tokenizer to ask it questions or to export it"
    return f"{request.out}: NVLM-{request.variant.upper()}, {len(source.infos)} weights, {count:,} parameters{missing}"


def _check_request(request: ImportRequest) -> None:
    if (request.whole is None) == (request.language is None and request.vision is None):
        raise UserError("name a whole NVLM folder with --hf, or its parts with --language-model and --vision-model")
    if request.whole is None and (request.language is None or request.vision is None):
        raise UserError("both --language-model and --vision-model are needed: neither part is ever new")
    if (request.out / "checkpoints" / STEP).exists() or (request.out / "config.yaml").exists():
        raise UserError(f"{request.out} is there already; name another folder, or remove it")
    for folder in filter(None, (request.whole, request.language, request.vision)):
        read_config(folder)


def _describe_run(request: ImportRequest, adapters: AdapterFolder | None) -> RunConfig:
    """A run file with the folders' sizes; the model's keys may be overridden."""
    language = request.whole or request.language
    vision = request.whole or request.vision
    assert language is not None and vision is not None
    config = read_config(language)
    vision_preset = vision_preset_of(vision)
    model: dict[str, Any] = {
        "variant": request.variant,
        "language": name_of(LANGUAGE_PRESETS, language_preset_of(language)),
        "vision": name_of(VISION_PRESETS, vision_preset),
    }
    # Sizes without a name are read from a copy of the folder's config.json.
    for key, presets, folder in (("language", LANGUAGE_PRESETS, language), ("vision", VISION_PRESETS, vision)):
        if model[key] not in presets:
            copied = request.out / f"{key}_model"
            copied.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / CONFIG_FILE, copied / CONFIG_FILE)
            model[key] = str(copied.resolve())
    if request.whole is not None:
        if not is_whole_folder(config):
            raise UserError(f"{request.whole} holds no whole NVLM; name it with --language-model or --vision-model")
        check_whole_folder(config, request.whole)
        model["weights"] = str(request.whole)
        model["cross_attention"] = dataclasses.asdict(cross_attention_of(config, request.whole))
    else:
        model |= {"language_weights": str(request.language), "vision_weights": str(request.vision)}
    if adapters is not None:
        model["lora"] = dataclasses.asdict(adapters.config)
    settings = _processor_settings(language)
    tags: dict[str, Any] = {name: config[name] for name in _TILING_KEYS if name in config}
    run = {
        "run_dir": str(request.out),
        "model": model,
        "data": {
            "train": [],
            "tokenizer": str(request.out / "tokenizer.json"),
            "sequence_length": 4096,
            "template": _template_of(request, config, settings),
            **({"system": settings["system"]} if "system" in settings else {}),
        },
        "tiling": {
            "tile_size": vision_preset.tile_size,
            "max_tiles": most_tiles_of(config),
            **tags,
        },
        "optimizer": {"max_lr": 0.0, "min_lr": 0.0, "warmup_steps": 0},
        "training": {
            "micro_batch_size": 1,
            "global_batch_size": 1,
            "train_steps": 1,
            "seed": request.seed,
            "precision": "bf16" if (request.dtype or _stored_dtype(config)) == torch.bfloat16 else "fp32",
        },
    }
    return _load_draft(request, run)


def _load_draft(request: ImportRequest, run: dict[str, Any]) -> RunConfig:
    """The run file with the overrides that were asked for."""
    request.out.mkdir(parents=True, exist_ok=True)
    draft = request.out / ".config.yaml"
    draft.write_text(yaml.safe_dump(run))
    try:
        return load_run(draft, request.overrides)
    finally:
        draft.unlink()


def _template_of(request: ImportRequest, config: dict[str, Any], settings: dict[str, Any]) -> str:
    """The template that a whole folder names, or NVLM's; UserError if there is none of that name and none is asked for."""
    of_model = config.get("template") if request.whole is not None else None  # parts begin a model of their own
    named = settings.get("template", {}).get("name") or of_model or "chatml"
    if named in TEMPLATES:
        return named
    if any(override.startswith("data.template=") for override in request.overrides):
        return "chatml"  # which the override replaces
    raise UserError(
        f"{request.whole or request.language} was trained with the template {named!r}, which is not known here; give "
        f"data.template= after the options, one of {', '.join(TEMPLATES)}"
    )


def _processor_settings(folder: Path) -> dict[str, Any]:
    """What a folder of ours says of prompts; nothing for others."""
    path = folder / "processor_config.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if isinstance(found, dict) and isinstance(found.get("template"), dict) else {}


def _stored_dtype(config: dict[str, Any]) -> torch.dtype:
    name = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _find_tokenizer(request: ImportRequest) -> Path | None:
    """The one that was named, or the folder's: its tokenizer.json, else its tokenizer.model."""
    if request.tokenizer is not None:
        return request.tokenizer
    folders = [folder for folder in (request.whole, request.language) if folder is not None]
    places = [folder / name for folder in folders for name in ("tokenizer.json", SENTENCEPIECE_FILE)]
    return next((path for path in places if path.is_file()), None)


def open_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json, or a tokenizer.model of SentencePiece; UserError if it is neither."""
    return Tokenizer(convert_sentencepiece(file)) if _is_sentencepiece(file) else Tokenizer.load(file)


def write_tokenizer(file: Path, target: Path) -> None:
    """Write it as a tokenizer.json, which is copied as it is."""
    open_tokenizer(file)
    if _is_sentencepiece(file):
        convert_sentencepiece(file).save(str(target))
    else:
        shutil.copyfile(file, target)


def _is_sentencepiece(file: Path) -> bool:
    return file.suffix == Path(SENTENCEPIECE_FILE).suffix
