"""Folders and checkpoints looked at: what they hold, by part, and two of them under the same names."""

from pathlib import Path

from megatron_nvlm.checkpoint import save_load
from megatron_nvlm.checkpoint.stream_files import CheckpointWeights
from megatron_nvlm.checkpoint.tensor_source import AsOurs, TensorInfo, TensorSource
from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.open_folders import folder_rows
from megatron_nvlm.hf.safetensors_files import SafetensorsFolder
from megatron_nvlm.models.families.config_file import CONFIG_FILE, read_config


def is_folder(path: Path) -> bool:
    """Whether it is a Hugging Face folder (else it is to be a run or a checkpoint)."""
    return (path / CONFIG_FILE).is_file()


def open_any(path: Path) -> TensorSource:
    """A Hugging Face folder under its own names, or a checkpoint under ours."""
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    return SafetensorsFolder(path) if is_folder(path) else CheckpointWeights(save_load.find_checkpoint(path))


def open_pair(first: Path, second: Path) -> tuple[TensorSource, TensorSource]:
    """Two of them under the same names: ours, if one is a checkpoint."""
    one, other = open_any(first), open_any(second)
    if is_folder(first) == is_folder(second):
        return one, other
    return (
        _as_ours(first, one) if is_folder(first) else one,
        _as_ours(second, other) if is_folder(second) else other,
    )


def _as_ours(folder: Path, theirs: TensorSource) -> TensorSource:
    return AsOurs(folder_rows(folder), theirs, str(folder))


def inspect(path: Path, source: TensorSource) -> str:
    """A table: part, tensors, parameters, bytes, types; and what the whole is."""
    parts: dict[str, list[TensorInfo]] = {}
    for name, info in source.infos.items():
        parts.setdefault(_part(name), []).append(info)
    lines = [f"{path}: {_describe(path)}", _line("part", "tensors", "parameters", "GB", "types")]
    for part, infos in [*sorted(parts.items()), ("all", list(source.infos.values()))]:
        types = sorted({str(info.dtype).removeprefix("torch.") for info in infos})
        numbers, num_bytes = sum(info.parameters for info in infos), sum(info.num_bytes for info in infos)
        lines.append(_line(part, str(len(infos)), f"{numbers:,}", f"{num_bytes / 1e9:.3f}", ", ".join(types)))
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"{cells[0]:<20}{cells[1]:>9}{cells[2]:>18}{cells[3]:>11}  {cells[4]}"


def _part(name: str) -> str:
    if "cross_att" in name:
        return "cross_attention"
    first = name.split(".", 1)[0]
    return {"mlp1": "vision_projection", "model": "language_model", "lm_head": "language_model"}.get(
        first, "vision_model" if first in ("embeddings", "encoder") else first
    )


def _describe(path: Path) -> str:
    if is_folder(path):
        return f"a Hugging Face folder of {read_config(path).get('model_type')}"
    checkpoint = save_load.find_checkpoint(path)
    identity = save_load.read_identity(checkpoint)
    what = f"NVLM-{identity.variant.upper()} of {identity.language} and {identity.vision}"
    return f"checkpoint {checkpoint.name} of {what}, in pieces that load under any layout"
