"""Bytes that a rank holds between steps: weights, gradients, optimizer state. Exact: a test compares them with real ranks.

The rules are those of Megatron-core's DistributedDataParallel and optimizers, restated for parameters that need not exist:

- a frozen parameter has its weight and nothing else;
- the gradients of a chunk's trainable parameters stand in one buffer, in float32 for bf16 weights;
- under the distributed optimizer so do their weights; in both buffers each parameter begins at a multiple of 64 elements,
  and the end is padded so that data-parallel ranks get equal shards of a multiple of 128 elements altogether;
- Adam keeps two float32 moments for each element of this rank's shard (of every element without the distributed
  optimizer), a float32 copy of it for bf16 weights, and 4 bytes a parameter for torch's count of steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_nvlm.estimate.ranks import BuiltRank, LocalParameter
from megatron_nvlm.models.precision import Precision

_PARAMETER_ALIGNMENT = 64
_BUFFER_ALIGNMENT = 128
_STEP_BYTES = 4


@dataclass(frozen=True)
class StateBytes:
    """What stays allocated between steps."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class _Buffer:
    """Places of a chunk's trainable parameters in their buffer, in elements."""

    ranges: tuple[tuple[int, int], ...]
    numel: int


def _lay_out(chunk: Sequence[LocalParameter], data_parallel_size: int, distributed: bool) -> _Buffer:
    ranges = []
    end = 0
    for parameter in reversed([parameter for parameter in chunk if parameter.trains]):
        start = _pad(end, _PARAMETER_ALIGNMENT) if distributed else end
        end = start + parameter.numel
        ranges.append((start, end))
    return _Buffer(tuple(ranges), _pad(end, math.lcm(data_parallel_size, _BUFFER_ALIGNMENT)) if distributed else end)


def _pad(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def state_bytes(
    rank: BuiltRank, precision: Precision, data_parallel_rank: int, data_parallel_size: int, distributed: bool
) -> StateBytes:
    """Bytes of one rank.

    Args:
        data_parallel_rank: which shard of the optimizer's state it has.
        distributed: whether the optimizer's state is spread over the data-parallel ranks.
    """
    weight_size, gradient_size = precision.parameter_dtype.itemsize, precision.gradient_dtype.itemsize
    state_size = precision.optimizer_bytes
    weights = gradients = optimizer = 0
    for chunk in rank.chunks:
        buffer = _lay_out(chunk, data_parallel_size, distributed)
        weights += weight_size * sum(parameter.numel for parameter in chunk if not parameter.trains)
        weights += weight_size * buffer.numel
        gradients += gradient_size * buffer.numel
        shard = (0, buffer.numel)
        if distributed:
            length = buffer.numel // data_parallel_size
            shard = (data_parallel_rank * length, (data_parallel_rank + 1) * length)
        owned = [max(min(end, shard[1]) - max(start, shard[0]), 0) for start, end in buffer.ranges]
        optimizer += sum(state_size * numel + _STEP_BYTES for numel in owned if numel)
    return StateBytes(weights, gradients, optimizer)


def largest_state_bytes(
    rank: BuiltRank, precision: Precision, data_parallel_size: int, distributed: bool
) -> StateBytes:
    """State bytes of the data-parallel rank that holds most; shards differ a little because of padding."""
    shards = range(data_parallel_size) if distributed else range(1)
    return max(
        (state_bytes(rank, precision, shard, data_parallel_size, distributed) for shard in shards),
        key=lambda state: state.total,
    )
