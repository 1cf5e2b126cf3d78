"""The micro-batch: one ragged sequence of samples, and for each of its tokens where its content comes from.

All pipeline stages hold it; only where tiles are encoded does it carry pixels.
Shapes: s decoder tokens, c context tokens, t tiles, S pixels along an edge of a tile.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_nvlm.ops.interval_attention import block_rows
from megatron_nvlm.sequence.assemble import IGNORED_LABEL, AssembledSample


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one micro-batch; numbers of vision tokens and context tokens count over the whole micro-batch."""

    tokens: Tensor
    """[s] ids; 0 where a vision token stands."""
    position_ids: Tensor
    """[s] positions, starting at 0 in each sample."""
    labels: Tensor
    """[s] the next token; IGNORED_LABEL where it is no target."""
    loss_mask: Tensor
    """[s] 1 where the next token is a target, else 0; float32."""
    cu_seqlens: Tensor
    """[samples + 1] boundaries of the samples (padding is one more), int32."""
    decoder_vision_index: Tensor
    """[s] number of the vision token that stands here; -1 for text."""
    context_tokens: Tensor
    """[c] ids of tags in the context; 0 elsewhere."""
    context_vision_index: Tensor
    """[c] number of the vision token that stands here; -1 for tags and padding."""
    context_intervals: Tensor
    """[s, 2] range [start, end) of context tokens that this token sees; int32."""
    tiles: Tensor
    """[t, 3, S, S] uint8; t may be 0. All tiles, or the range of them that this rank encodes, or none."""
    keys: tuple[str, ...]
    """Names of the samples, for messages."""
    num_tiles: int
    """Of all samples."""
    first_tile: int = 0
    """Number of `tiles[0]` among them."""
    adjustments: tuple[str, ...] = ()
    """What samples gave up so that they fit, one name for each that did."""
    datasets: tuple[int, ...] = ()
    """Of each sample, which of the sets it is from; empty where nobody asks."""
    sample_tiles: tuple[int, ...] = ()
    """Tiles of each sample; empty where nobody asks."""
    boundaries: tuple[int, ...] = ()
    """`cu_seqlens` on the host, so that nobody waits for the device to know them."""
    target_rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Places of the tokens whose next token is a target."""
    context_blocks: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int32))
    """[blocks of context tokens, 2] which tokens see each block, as `block_rows` (ops/interval_attention.py) says it."""

    def __post_init__(self) -> None:
        """What follows from the other fields, once, on the host."""
        if self.boundaries:
            return
        derived: dict[str, Any] = {
            "boundaries": tuple(self.cu_seqlens.tolist()),
            "target_rows": self.loss_mask.nonzero().flatten(),
            "context_blocks": torch.from_numpy(
                block_rows(self.context_intervals.cpu().numpy(), len(self.context_tokens))
            ).to(self.context_intervals.device),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # frozen for everybody else

    def context_mask(self) -> Tensor:
        """[s + blocks, 2]: the intervals, and after them `context_blocks`. Core's recomputation keeps one tensor."""
        return torch.cat([self.context_intervals, self.context_blocks])

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on a device; copies of pinned memory do not wait."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "MicroBatch":
        """The same micro-batch in pinned memory."""
        return self._with_each(lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory())

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **changed)


def pack(
    samples: Sequence[AssembledSample],
    tiles: Tensor,
    keys: Sequence[str],
    tokens_per_tile: int,
    pad_to_multiple: int = 1,
    with_context: bool = False,
    first_tile: int = 0,
) -> MicroBatch:
    """Put samples one after the other into one ragged sequence.

    Args:
        samples: at least one.
        tiles: [t, 3, S, S], those of all samples in order, or a range of them that begins at `first_tile` (none, where
            nothing is encoded).
        tokens_per_tile: vision tokens that a tile becomes.
        pad_to_multiple: decoder and context tokens are padded to a multiple of it (sequence parallelism). Padding is a
            sample of its own without target, and no token sees padding of the context.
        with_context: whether the model has cross-attention; the context then has at least one token, so that batches
            without images run the same collectives.
    """
    rows = sum(len(sample.tokens) for sample in samples)
    token_padding = -rows % pad_to_multiple
    num_context_tokens = sum(len(sample.context_tokens) for sample in samples) if with_context else 0
    context_padding = (
        max(-num_context_tokens % pad_to_multiple, pad_to_multiple - num_context_tokens) if with_context else 0
    )

    lengths = [len(sample.tokens) for sample in samples] + ([token_padding] if token_padding else [])
    decoder_index, context_index, intervals = [], [], []
    vision_before = context_before = 0
    for sample in samples:
        decoder_index.append(_shift(sample.decoder_vision_index, vision_before))
        if with_context:
            context_index.append(_shift(sample.context_vision_index, vision_before))
            seen = sample.context_intervals[:, 1:] > sample.context_intervals[:, :1]
            intervals.append(sample.context_intervals + seen * context_before)
            context_before += len(sample.context_tokens)
        else:
            intervals.append(np.zeros((len(sample.tokens), 2), dtype=np.int32))
        vision_before += sample.num_tiles * tokens_per_tile
    context_tokens = [sample.context_tokens for sample in samples] if with_context else []
    return MicroBatch(
        tokens=_join([sample.tokens for sample in samples], token_padding, 0, np.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        labels=_join([sample.labels for sample in samples], token_padding, IGNORED_LABEL, np.int64),
        loss_mask=_join([sample.loss_mask for sample in samples], token_padding, 0, np.float32),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        decoder_vision_index=_join(decoder_index, token_padding, -1, np.int64),
        context_tokens=_join(context_tokens, context_padding, 0, np.int64),
        context_vision_index=_join(context_index, context_padding, -1, np.int64),
        context_intervals=torch.from_numpy(
            np.concatenate([*intervals, np.zeros((token_padding, 2), dtype=np.int32)]).astype(np.int32)
        ),
        tiles=tiles,
        keys=tuple(keys),
        num_tiles=sum(sample.num_tiles for sample in samples),
        first_tile=first_tile,
    )


def _shift(index: np.ndarray, by: int) -> np.ndarray:
    return np.where(index >= 0, index + by, -1)


def _join(parts: Sequence[np.ndarray], padding: int, fill: int, dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([*parts, np.full(padding, fill)]).astype(dtype))
