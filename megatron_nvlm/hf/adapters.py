"""Low-rank adapters outside of a run: folders as PEFT writes and reads them, and adapters merged into their layers.

A folder has `adapter_config.json` and `adapter_model.safetensors`; its names are those of the model that the adapters belong
to, with a prefix of PEFT's. We write names of a whole NVLM folder, and read those of a language model too.
"""

import json
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_nvlm.checkpoint.tensor_source import AsOurs, TensorSource
from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.safetensors_files import SafetensorsFolder
from megatron_nvlm.models.families.config_keys import shorten
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.lora import LAYERS, TARGETS, LoraConfig
from megatron_nvlm.models.weight_rows import ByGroup, Direct, GateAndUp, Row, Transform
from megatron_nvlm.regular_files import check_regular

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
WHOLE_PREFIX = "base_model.model.language_model.model."
"""Of PEFT's names, where the adapters belong to a whole NVLM folder."""
_LAYER_OF = {target: layer for layer, targets in LAYERS.items() for target in targets}
_MODULES = {"linear_qkv": "self_attention", "linear_proj": "self_attention", "linear_fc1": "mlp", "linear_fc2": "mlp"}
_THEIR_MODULES = {"self_attention": "self_attn", "mlp": "mlp"}
_NAME = re.compile(r"^(base_model\.model\.(?:[\w.]*\.)?)layers\.\d+\.(?:self_attn|mlp)\.(\w+)\.lora_[AB]\.weight$")

_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights")
_WITHOUT_EFFECT = (
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    # Which layers have adapters is told by the weights.
    *("target_modules", "exclude_modules", "layers_pattern"),
    # Of the values before training, where it does not change the base model; of memory; of a kind that is left out.
    *("eva_config", "runtime_config", "qalora_group_size", "megatron_core"),
)
"""Keys of adapter_config.json that change nothing here. Any other key that is not false or empty is refused."""
_BASE_STAYS = (True, False, None, "gaussian", "eva", "orthogonal")
"""First values (`init_lora_weights`) for which PEFT does not change the weights of the base model."""


def adapter_rows(preset: LanguagePreset, targets: Collection[str], prefix: str = WHOLE_PREFIX) -> list[Row]:
    """Our names of all adapters and PEFT's, below the prefix of theirs."""
    rows = []
    for number in range(preset.num_layers):
        for target in (target for target in TARGETS if target in targets):
            layer = _LAYER_OF[target]
            module = _MODULES[layer]
            ours = f"language_model.decoder.layers.{number}.{module}.{layer}.adapters.{target}"
            theirs = f"{prefix}layers.{number}.{_THEIR_MODULES[module]}.{target}"
            for kind in "ab":
                rows.append(Row(f"{ours}.lora_{kind}", (f"{theirs}.lora_{kind.upper()}.weight",), Direct()))
    return rows


def describe_adapters(lora: LoraConfig, base: str | None) -> dict[str, Any]:
    """What adapter_config.json says.

    Args:
        base: name or path of the folder that the adapters belong to.
    """
    modules = "|".join(target for target in TARGETS if target in lora.targets)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        # Cross-attention has layers of these names too, so the whole name is matched.
        "target_modules": rf".*language_model\.model\.layers\.\d+\.(self_attn|mlp)\.({modules})",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


class AdapterFolder:
    """A folder as PEFT writes it, checked; its weights are read when they are asked for.

    Raises:
        UserError: it is none, or of a kind that is not known here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._described = _read_description(folder / ADAPTER_CONFIG_FILE)
        self._check_kind()
        self._source = SafetensorsFolder(folder, ADAPTER_FILE)
        found = [_NAME.match(name) for name in self._source.infos]
        prefixes = {match[1] for match in found if match}
        if len(prefixes) != 1:
            raise UserError(
                f"{folder / ADAPTER_FILE} has adapters of {len(prefixes)} language models; it must be those of one, "
                f"with names such as {WHOLE_PREFIX}layers.0.self_attn.q_proj.lora_A.weight"
            )
        (self._prefix,) = prefixes
        self._targets = sorted({match[2] for match in found if match}, key=_place)

    @property
    def config(self) -> LoraConfig:
        """Section `model.lora` of a run with these adapters."""
        rank, alpha, dropout = (self._number(key) for key in ("r", "lora_alpha", "lora_dropout"))
        if rank != int(rank):
            raise UserError(f"{self.folder / ADAPTER_CONFIG_FILE} says r {rank}; it must be a whole number")
        return LoraConfig(int(rank), alpha, dropout, self._targets)

    def as_ours(self, preset: LanguagePreset) -> TensorSource:
        """The weights under our names; CensusError unless every layer has those of every target, and nothing else."""
        rows = adapter_rows(preset, self._targets, self._prefix)
        return AsOurs(rows, self._source, str(self.folder))

    def _check_kind(self) -> None:
        where = self.folder / ADAPTER_CONFIG_FILE
        if self._described.get("peft_type") != "LORA":
            raise UserError(f"{where} says peft_type {self._described.get('peft_type')!r}; only LORA is read")
        possible = {"bias": ("none", None), "init_lora_weights": _BASE_STAYS}
        for key, value in self._described.items():
            if key not in (*_READ, *_WITHOUT_EFFECT) and value or value not in possible.get(key, (value,)):
                raise UserError(f"{where} says {key} {shorten(value)}, which is not known here; merge them by PEFT")

    def _number(self, key: str) -> float:
        value = self._described.get(key, 0.0 if key == "lora_dropout" else None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{self.folder / ADAPTER_CONFIG_FILE} says {key} {json.dumps(value)}; it must be a number")
        return value


def _read_description(path: Path) -> dict[str, Any]:
    check_regular(path)
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path.parent} is no folder of adapters: its {path.name} cannot be read ({error}); name one that PEFT wrote"
        ) from error
    if not isinstance(described, dict):
        raise UserError(f"{path} holds no description of adapters")
    return described


def _place(target: str) -> tuple[int, str]:
    return (TARGETS.index(target) if target in TARGETS else len(TARGETS), target)


class AdaptersOnly:
    """The adapters of a checkpoint under PEFT's names."""

    def __init__(self, ours: TensorSource, preset: LanguagePreset, lora: LoraConfig) -> None:
        self._ours = ours
        self._names = {row.theirs[0]: row.ours for row in adapter_rows(preset, lora.targets)}
        self.infos = {theirs: ours.infos[name] for theirs, name in self._names.items()}

    def read(self, name: str) -> Tensor:
        """One matrix."""
        return self._ours.read(self._names[name])


class WithoutAdapters:
    """A checkpoint's weights without its adapters, as if it had none, or with what they add to their layers.

    Args:
        merged: whether W becomes W + alpha / rank * B A, computed in float64 and rounded to the type of W.
    """

    def __init__(self, ours: TensorSource, preset: LanguagePreset, lora: LoraConfig, merged: bool) -> None:
        self._ours, self._preset, self._lora = ours, preset, lora
        self._merged = merged
        self.infos = {name: info for name, info in ours.infos.items() if ".adapters." not in name}

    def read(self, name: str) -> Tensor:
        """One tensor of the model without adapters."""
        weight = self._ours.read(name)
        path, _, kind = name.rpartition(".")
        layer = path.rpartition(".")[2]
        if (
            not self._merged
            or kind != "weight"
            or not path.startswith("language_model.")
            or not self._has_adapters(path)
        ):
            return weight
        added = self._transform(layer).to_ours(list(self._added(path, layer)))
        return (weight.double() + self._lora.scale * added).to(weight.dtype)

    def _has_adapters(self, path: str) -> bool:
        return any(name.startswith(f"{path}.adapters.") for name in self._ours.infos)

    def _added(self, path: str, layer: str) -> Iterator[Tensor]:
        """B A of each part of a fused layer; zeros for a part without an adapter."""
        inputs = self._ours.infos[f"{path}.weight"].shape[1]
        for target, outputs in zip(LAYERS[layer], self._outputs(path, layer), strict=True):
            adapter = f"{path}.adapters.{target}"
            if f"{adapter}.lora_a" in self._ours.infos:
                a, b = (self._ours.read(f"{adapter}.lora_{kind}").double() for kind in "ab")
                yield b @ a
            else:
                yield torch.zeros(outputs, inputs, dtype=torch.float64)

    def _outputs(self, path: str, layer: str) -> tuple[int, ...]:
        if layer == "linear_qkv":
            keys = self._preset.num_query_groups * self._preset.head_size
            return self._preset.query_size, keys, keys
        parts = len(LAYERS[layer])
        return (self._ours.infos[f"{path}.weight"].shape[0] // parts,) * parts

    def _transform(self, layer: str) -> Transform:
        if layer == "linear_qkv":
            groups = self._preset.num_query_groups
            return ByGroup(groups, (self._preset.num_attention_heads // groups, 1, 1))
        return GateAndUp() if layer == "linear_fc1" else Direct()


def write_adapter_config(folder: Path, lora: LoraConfig, base: str | None) -> None:
    """adapter_config.json."""
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(describe_adapters(lora, base), indent=2) + "\n")
