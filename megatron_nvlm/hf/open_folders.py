"""Hugging Face folders as sources of our parameters: a whole NVLM, or a language model and a vision model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_nvlm.checkpoint.tensor_source import AsOurs, Joined, TensorInfo, TensorSource
from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.config_json import (
    check_whole_folder,
    cross_attention_of,
    is_whole_folder,
    padding_heads_of,
    variant_of,
)
from megatron_nvlm.hf.safetensors_files import SafetensorsFolder
from megatron_nvlm.hf.weight_tables import language_rows, nvlm_rows, vision_rows
from megatron_nvlm.models.config import ResolvedModel
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.families.config_file import read_config
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.families.language_json import language_preset_of
from megatron_nvlm.models.families.vision_family import VisionPreset
from megatron_nvlm.models.families.visions import find_vision_family, vision_family_of, vision_preset_of
from megatron_nvlm.models.initialise import ADAPTERS, component_of
from megatron_nvlm.models.weight_rows import CensusError, Row, check_their_names

# Parts of our model that a run may begin without: they are new where the folders have none.
MAY_BE_NEW = ("cross_attention", "vision_projection", ADAPTERS)


class _Some:
    """Some tensors of a source."""

    def __init__(self, source: TensorSource, names: Iterable[str]) -> None:
        self._source = source
        self.infos = {name: source.infos[name] for name in names}

    def read(self, name: str) -> Tensor:
        return self._source.read(name)


@dataclass(frozen=True)
class FolderWeights:
    """What folders give to a model."""

    rows: dict[str, Row]
    """By our names."""
    theirs: TensorSource
    ours: TensorSource
    """The same weights under our names."""


def open_folders(model: ResolvedModel) -> FolderWeights | None:
    """The folders that a run's model names, checked name by name and size by size; None if it names none.

    Raises:
        UserError: folders of another model, or both a whole folder and parts. CensusError: with the full list.
    """
    config = model.config
    if config.weights is None and config.language_weights is None and config.vision_weights is None:
        return None
    if config.weights is not None and (config.language_weights or config.vision_weights):
        raise UserError(
            "model.weights names a whole NVLM, and model.language_weights or model.vision_weights a part; keep one of them"
        )
    opened: list[tuple[list[Row], TensorSource, str]] = []
    if config.weights is not None:
        opened.append(_whole(Path(config.weights), model))
    if config.language_weights is not None:
        opened.append(_language(Path(config.language_weights), model.language))
    if config.vision_weights is not None:
        opened.append(_vision(Path(config.vision_weights), model.vision))
    wanted = set(expected_names(model))
    rows, theirs, ours = [], [], []
    for found, source, where in opened:
        # The whole folder is accounted for, also what this variant leaves out.
        check_their_names(found, source.infos, where)
        _refuse_mixed_dtypes(found, source, where)
        kept = [row for row in found if row.ours in wanted]
        rows += kept
        theirs.append(source)
        ours.append(AsOurs(kept, _Some(source, (name for row in kept for name in row.theirs)), where))
    return FolderWeights({row.ours: row for row in rows}, Joined(theirs), Joined(ours))


def expected_names(model: ResolvedModel) -> list[str]:
    """Our names of the whole model, from the tables."""
    rows = nvlm_rows(model.variant, model.language, model.vision, model.config.cross_attention)
    return [row.ours for row in rows]


def folder_rows(folder: Path) -> list[Row]:
    """The rows of a folder by its own config.json: a whole NVLM, a vision model, or a language model."""
    config = read_config(folder)
    if is_whole_folder(config):
        variant, cross = variant_of(config, folder), cross_attention_of(config, folder)
        language, vision = language_preset_of(folder), vision_preset_of(folder)
        return nvlm_rows(variant, language, vision, cross, padding_heads_of(config))
    if find_vision_family(config) is not None:
        return _own_vision(folder, vision_preset_of(folder))[0]
    return language_rows(language_preset_of(folder))


def _whole(folder: Path, model: ResolvedModel) -> tuple[list[Row], TensorSource, str]:
    config = read_config(folder)
    if not is_whole_folder(config):
        raise UserError(f"{folder} holds no whole NVLM; name it as model.language_weights or model.vision_weights")
    check_whole_folder(config, folder)
    variant = variant_of(config, folder)
    if variant.needs_cross_attention:
        if variant != model.variant:
            raise UserError(
                f"{folder} holds NVLM-{variant.name.upper()} and model.variant is {model.variant.name}; set model.variant="
                f"{variant.name}, or name its base models as model.language_weights and model.vision_weights"
            )
        _same_cross_attention(folder, cross_attention_of(config, folder), model.config.cross_attention, model.language)
    _same_language(folder, model.language)
    _same_vision(folder, model.vision)
    return folder_rows(folder), SafetensorsFolder(folder), str(folder)


def _language(folder: Path, preset: LanguagePreset) -> tuple[list[Row], TensorSource, str]:
    _same_language(folder, preset)
    return _part(folder, partial(language_rows, preset), "language_model.")


def _vision(folder: Path, preset: VisionPreset) -> tuple[list[Row], TensorSource, str]:
    _same_vision(folder, preset)
    if is_whole_folder(read_config(folder)):
        return _part(folder, partial(vision_rows, preset), "vision_model.")
    return _own_vision(folder, preset)


def _own_vision(folder: Path, preset: VisionPreset) -> tuple[list[Row], TensorSource, str]:
    """A vision model in a folder of its own, without what NVLM has no use for."""
    family, source = vision_family_of(preset), SafetensorsFolder(folder)
    used = [name for name in source.infos if not name.startswith(family.unused_names)]
    prefix = family.own_prefix if any(name.startswith(family.own_prefix) for name in used) else ""
    return vision_rows(preset, prefix), _Some(source, used), str(folder)


def _part(folder: Path, rows: Callable[[str], list[Row]], prefix: str) -> tuple[list[Row], TensorSource, str]:
    """A part in a folder of its own, or below its prefix in a whole one."""
    source = SafetensorsFolder(folder)
    if not is_whole_folder(read_config(folder)):
        return rows(""), source, str(folder)
    return rows(prefix), _Some(source, [name for name in source.infos if name.startswith(prefix)]), str(folder)


def _same_language(folder: Path, preset: LanguagePreset) -> None:
    found = language_preset_of(folder)
    _same_sizes(folder, vars(found), vars(preset), "model.language")


def _same_vision(folder: Path, preset: VisionPreset) -> None:
    found = {**vars(vision_preset_of(folder)), "layer_scale_init": preset.layer_scale_init}
    _same_sizes(folder, found, vars(preset), "model.vision")


def _same_cross_attention(
    folder: Path, found: CrossAttentionConfig, wanted: CrossAttentionConfig, language: LanguagePreset
) -> None:
    there, here = _describe(found, language), _describe(wanted, language)
    if there != here:
        layers, heads, groups, qk_norm = there
        raise UserError(
            f"{folder} has cross-attention in layers {layers} with {heads} heads, {groups} groups and qk_norm {qk_norm} "
            f"and model.cross_attention in {here[0]} with {here[1]}, {here[2]} and {here[3]}; set "
            f"interval={found.interval}, offset={found.offset}, num_attention_heads={heads}, num_query_groups={groups} and "
            f"qk_norm={str(qk_norm).lower()}"
        )


def _describe(config: CrossAttentionConfig, language: LanguagePreset) -> tuple[list[int], int, int, bool]:
    """(layers, heads, key/value groups, qk_norm)."""
    return (
        sorted(config.layers(language.num_layers)),
        config.num_attention_heads or language.num_attention_heads,
        config.num_query_groups or language.num_query_groups,
        config.qk_norm,
    )


def _same_sizes(folder: Path, found: dict[str, object], wanted: dict[str, object], key: str) -> None:
    for name, value in found.items():
        if value != wanted[name]:
            raise UserError(
                f"{folder} has {name} {value} and {key} has {wanted[name]}; set {key} to the preset of that model, or to "
                "the folder itself"
            )


def _refuse_mixed_dtypes(rows: Sequence[Row], source: TensorSource, where: str) -> None:
    mixed = [row.ours for row in rows if len({source.infos[name].dtype for name in row.theirs}) > 1]
    if mixed:
        raise CensusError(f"{where}: tensors of one weight have several types, {mixed[0]} first", mixed)


def check_shapes(found: dict[str, TensorInfo], wanted: dict[str, TensorInfo], where: str) -> None:
    """Every weight has the model's shape; CensusError with all that do not."""
    wrong = [
        f"{name}: {list(info.shape)} there, {list(wanted[name].shape)} in this model"
        for name, info in found.items()
        if info.shape != wanted[name].shape
    ]
    if wrong:
        raise CensusError(
            f"{where} has {len(wrong)} tensors of other shapes, {wrong[0]} first; is this another model?", wrong
        )


def refuse_missing_components(found: Sequence[str], wanted: Sequence[str], where: str) -> list[str]:
    """Names that are to be new; CensusError if anything is missing that cannot be."""
    new = sorted(set(wanted) - set(found))
    missing = [name for name in new if component_of(name) not in MAY_BE_NEW]
    if missing:
        raise CensusError(
            f"{where} gives nothing for {len(missing)} weights of parts that are never new, {missing[0]} among them; name "
            "the folders of both the language model and the vision model",
            missing,
        )
    return new
