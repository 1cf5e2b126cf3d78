"""Low-rank adapters (LoRA) beside the decoder's linear layers: y = W x + alpha / rank * B A x, of which A and B train.

Core keeps queries, keys and values in one linear layer, and so the two halves of SwiGLU; here each of them has its own pair,
as in PEFT. A column-parallel layer splits B, a row-parallel one A; the other matrix is whole on every tensor-parallel rank.
Only tokens of `rank` numbers cross ranks. Shapes: s decoder tokens, r rank, i and o inputs and outputs of a layer.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor
from torch.nn.functional import dropout, linear

from megatron_nvlm.errors import UserError

LAYERS: dict[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Linear layers of a decoder layer, and what Hugging Face calls their parts, in order."""
TARGETS = tuple(target for targets in LAYERS.values() for target in targets)


@dataclass(frozen=True)
class LoraConfig:
    """Section `model.lora`: adapters of the decoder's self-attention and MLP."""

    rank: int = 0
    """Columns between the two matrices of an adapter; 0 for no adapters."""
    alpha: float = 16.0
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    """Linear layers that have an adapter, by their names in Hugging Face folders (TARGETS)."""

    @property
    def scale(self) -> float:
        """Factor of an adapter's output."""
        return self.alpha / self.rank

    def targets_of(self, layer: str) -> tuple[str, ...]:
        """Parts of one linear layer that have an adapter."""
        return tuple(target for target in LAYERS[layer] if target in self.targets) if self.rank else ()


def check_lora(config: LoraConfig) -> None:
    """Refuse adapters that cannot be built."""
    if config.rank < 0:
        raise UserError(f"model.lora.rank is {config.rank}; it must be at least 1, or 0 for no adapters")
    if not 0 < config.alpha < math.inf:
        raise UserError(f"model.lora.alpha is {config.alpha}; it must be a number above 0")
    if not 0 <= config.dropout < 1:
        raise UserError(f"model.lora.dropout is {config.dropout}; it must be at least 0 and below 1")
    unknown = [target for target in config.targets if target not in TARGETS]
    if unknown or not config.targets or len(set(config.targets)) < len(config.targets):
        raise UserError(f"model.lora.targets is {config.targets}; name some of {', '.join(TARGETS)}, each once")


class Adapter(torch.nn.Module):
    """The two matrices of one target, or this rank's part of them; models/initialise.py gives them values."""

    def __init__(self, inputs: int, outputs: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.lora_a = torch.nn.Parameter(torch.zeros(rank, inputs, dtype=dtype))
        self.lora_b = torch.nn.Parameter(torch.zeros(outputs, rank, dtype=dtype))


def with_adapters(parallel_linear: type, layer: str, lora: LoraConfig) -> type:
    """A class of linear layers with the adapters of `layer` (LAYERS) beside it; the class itself where there are none."""
    if not lora.targets_of(layer):
        return parallel_linear
    base = _ColumnAdapters if layer in ("linear_qkv", "linear_fc1") else _RowAdapters
    return type(f"{parallel_linear.__name__}WithAdapters", (base, parallel_linear), {"lora": lora, "layer": layer})


class _Adapters(torch.nn.Module):
    """What stands before a parallel linear layer in the order of its bases."""

    lora: LoraConfig
    layer: str
    split_axis: dict[str, int]
    """Of the matrix that is split."""

    def __init__(self, input_size: int, output_size: int, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, *args, config=config, **kwargs)
        self.group = get_tensor_model_parallel_group_if_none(kwargs.get("tp_group"))
        self.over_sequence = config.sequence_parallel
        self.adapters = torch.nn.ModuleDict()
        self.widths = self._widths(output_size, config)
        for target in self.lora.targets_of(self.layer):
            adapter = self._adapter(input_size, self.widths[target], config.params_dtype)
            self.adapters[target] = adapter
            for name, parameter in adapter.named_parameters():
                # Under sequence parallelism each rank computes the whole matrix's gradient from its share of the tokens.
                parameter.sequence_parallel = config.sequence_parallel and name not in self.split_axis  # type: ignore[attr-defined]

    def _widths(self, output_size: int, config: TransformerConfig) -> dict[str, int]:
        """Outputs of each target of the layer, over all ranks."""
        if self.layer == "linear_qkv":
            head = config.kv_channels or config.hidden_size // config.num_attention_heads
            groups = config.num_query_groups or config.num_attention_heads
            return {"q_proj": head * config.num_attention_heads, "k_proj": head * groups, "v_proj": head * groups}
        targets = LAYERS[self.layer]
        return {target: output_size // len(targets) for target in targets}

    @abstractmethod
    def _adapter(self, inputs: int, outputs: int, dtype: torch.dtype) -> Adapter:
        """New matrices of a target, of this rank's share of inputs or outputs."""

    @abstractmethod
    def _delta(self, hidden: Tensor) -> Tensor:
        """What the adapters add to the layer's output, before it is scaled."""

    def _matrices(self, target: str) -> Adapter:
        adapter = self.adapters[target]
        assert isinstance(adapter, Adapter)
        return adapter

    def _narrow(self, target: str, hidden: Tensor) -> Tensor:
        """This rank's tokens of `rank` numbers [..., r]."""
        dropped = dropout(hidden, self.lora.dropout) if self.training and self.lora.dropout else hidden
        return linear(dropped, self._matrices(target).lora_a)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the linear layer: [s, 1, i] -> [s, 1, o] and a bias that is still to be added."""
        output, bias = super().forward(hidden, *args, **kwargs)
        return output + self.lora.scale * self._delta(hidden), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As core's, with the adapters as they are split."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        own = self.adapters.state_dict(keep_vars=True)
        axes = {name: self.split_axis[kind] for name in own if (kind := name.rpartition(".")[2]) in self.split_axis}
        state |= make_sharded_tensors_for_checkpoint(
            own,
            f"{prefix}adapters.",
            axes,
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return state


class _ColumnAdapters(_Adapters):
    """Beside a layer whose outputs are split over ranks: A whole, B split."""

    split_axis = {"lora_b": 0}

    def _adapter(self, inputs: int, outputs: int, dtype: torch.dtype) -> Adapter:
        return Adapter(inputs, outputs // self.group.size(), self.lora.rank, dtype)

    def _delta(self, hidden: Tensor) -> Tensor:
        """[s, 1, i] -> [s, 1, o / TP], in the order of the fused layer's outputs."""
        targets = list(self.adapters)
        narrow = torch.cat([self._narrow(target, hidden) for target in targets], -1)  # [s, 1, targets * r]
        if self.over_sequence:
            narrow = gather_from_sequence_parallel_region(narrow, tensor_parallel_output_grad=True, group=self.group)
        else:
            narrow = copy_to_tensor_model_parallel_region(narrow, group=self.group)
        by_target = dict(zip(targets, narrow.chunk(len(targets), -1), strict=True))
        parts = []
        for target, width in self.widths.items():
            if target in by_target:
                parts.append(linear(by_target[target], self._matrices(target).lora_b))  # [s, 1, o of the target / TP]
            else:
                parts.append(narrow.new_zeros(*narrow.shape[:-1], width // self.group.size()))
        return self._in_order(parts)

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        """Core orders queries, keys and values by key/value group; the halves of SwiGLU stand one after the other."""
        groups = 1
        if self.layer == "linear_qkv":
            config: TransformerConfig = self.config
            groups = (config.num_query_groups or config.num_attention_heads) // self.group.size()
        grouped = [part.unflatten(-1, (groups, -1)) for part in parts]  # [s, 1, groups, o of a group]
        return torch.cat(grouped, -1).flatten(-2)  # [s, 1, o / TP]


class _RowAdapters(_Adapters):
    """Beside a layer whose inputs are split over ranks: A split, B whole."""

    split_axis = {"lora_a": 1}

    def _adapter(self, inputs: int, outputs: int, dtype: torch.dtype) -> Adapter:
        return Adapter(inputs // self.group.size(), outputs, self.lora.rank, dtype)

    def _delta(self, hidden: Tensor) -> Tensor:
        """[s, 1, i / TP] -> [s, 1, o] (a shard under sequence parallelism)."""
        (target,) = self.adapters
        add_up: Callable[..., Tensor] = (
            reduce_scatter_to_sequence_parallel_region
            if self.over_sequence
            else reduce_from_tensor_model_parallel_region
        )
        narrow = add_up(self._narrow(target, hidden), group=self.group)  # [s, 1, r]
        return linear(narrow, self._matrices(target).lora_b)
