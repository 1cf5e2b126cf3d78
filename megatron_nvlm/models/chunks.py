"""What one rank holds of the model: one chunk, or several when pipeline stages are interleaved (virtual stages)."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_nvlm.models.nvlm_model import NVLMModel


class ModelChunks(torch.nn.Module):
    """Chunks in the order in which a micro-batch passes through them; the first holds what a stage has of vision."""

    def __init__(self, chunks: Iterable[NVLMModel]) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)

    def __iter__(self) -> Iterator[NVLMModel]:
        return iter(self.chunks)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.chunks)

    @property
    def first(self) -> NVLMModel:
        """The chunk that a micro-batch meets first."""
        return next(iter(self))

    @property
    def config(self) -> TransformerConfig:
        """The decoder's configuration, the same for all chunks."""
        return self.first.config

    @property
    def pre_process(self) -> bool:
        """Whether the embedding is here."""
        return self.first.pre_process

    @property
    def post_process(self) -> bool:
        """Whether the output layer is here."""
        return list(self)[-1].post_process

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Core's state of each chunk under its number; names in the checkpoint are those of the whole model."""
        return {
            f"chunk_{number}": chunk.sharded_state_dict(prefix, sharded_offsets, metadata)
            for number, chunk in enumerate(self)
        }

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """The inverse of `sharded_state_dict`, after loading."""
        for number, chunk in enumerate(self):
            chunk.load_state_dict(state_dict[f"chunk_{number}"], *args, **kwargs)


def chunks_of(model: NVLMModel | ModelChunks) -> list[NVLMModel]:
    """The chunks of a model that may be a single one."""
    return [model] if isinstance(model, NVLMModel) else list(model)
