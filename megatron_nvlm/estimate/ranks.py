"""Every distinct rank of a run, built in one process: a pretended world of ranks, weights on the meta device.

Groups are laid out and stages are built by the code that training uses; only the process group is torch's fake one,
which sends nothing, and no memory is allocated for weights.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore  # torch registers the backend "fake" here only

from megatron_nvlm.core_compat import run_core_on_cpu
from megatron_nvlm.models.build import build_chunks
from megatron_nvlm.models.config import ResolvedModel
from megatron_nvlm.models.initialise import component_of, named_parameters, split_of
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.sharding import Split
from megatron_nvlm.parallel.groups import get_groups, get_single_rank_groups, lay_out_groups, stop_groups


@dataclass(frozen=True)
class LocalParameter:
    """A parameter as one rank holds it."""

    name: str
    """Its name in the whole model."""
    shape: tuple[int, ...]
    trains: bool
    split: Split | None = None
    """How it is cut; None if it is whole on each tensor-parallel rank."""

    @property
    def numel(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()

    @property
    def part(self) -> str:
        """vision_model, vision_projection, cross_attention or language_model."""
        return component_of(self.name)


@dataclass(frozen=True)
class BuiltRank:
    """What a rank holds. Ranks that differ in their data-parallel number only hold the same."""

    stage: int
    tensor_rank: int
    chunks: tuple[tuple[LocalParameter, ...], ...]
    """Parameters of each chunk of the stage, in the model's order."""

    @property
    def parameters(self) -> tuple[LocalParameter, ...]:
        """Parameters of all chunks."""
        return tuple(parameter for chunk in self.chunks for parameter in chunk)


@contextmanager
def pretend_to_be(rank: int, world_size: int, parallelism: ParallelismConfig) -> Iterator[None]:
    """Within it, this process is one rank of a world whose other ranks do not exist; collectives return at once."""
    assert not dist.is_initialized(), "a dry run needs a process that is in no process group"
    run_core_on_cpu()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        lay_out_groups(parallelism, with_cpu_groups=False)
        yield
    finally:
        stop_groups()


def build_rank(
    model: ResolvedModel,
    parallelism: ParallelismConfig,
    world_size: int,
    stage: int,
    tensor_rank: int,
    dtype: torch.dtype,
    trainable: Collection[str],
) -> BuiltRank:
    """Build one rank of the first model replica on the meta device, and note what it holds."""
    stages = parallelism.pipeline_model_parallel_size
    rank = stage * (world_size // stages) + tensor_rank  # core's order: tensor, then data, then pipeline parallel
    with pretend_to_be(rank, world_size, parallelism):
        place = (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
        )
        assert place == (stage, tensor_rank, 0), place
        chunks = build_chunks(model, parallelism, get_groups(), get_single_rank_groups(), dtype, torch.device("meta"))
        return BuiltRank(
            stage,
            tensor_rank,
            tuple(
                tuple(
                    LocalParameter(name, tuple(parameter.shape), component_of(name) in trainable, split_of(name, chunk))
                    for name, parameter in named_parameters(chunk)
                )
                for chunk in chunks
            ),
        )


def build_ranks(
    model: ResolvedModel,
    parallelism: ParallelismConfig,
    world_size: int,
    dtype: torch.dtype,
    trainable: Collection[str],
) -> list[BuiltRank]:
    """All distinct ranks: each tensor-parallel rank of each pipeline stage."""
    return [
        build_rank(model, parallelism, world_size, stage, tensor_rank, dtype, trainable)
        for stage in range(parallelism.pipeline_model_parallel_size)
        for tensor_rank in range(parallelism.tensor_model_parallel_size)
    ]


def build_whole(model: ResolvedModel, dtype: torch.dtype, trainable: Collection[str]) -> BuiltRank:
    """The whole model, as a single rank would hold it."""
    return build_rank(model, ParallelismConfig(), 1, 0, 0, dtype, trainable)
