"""The dry run's weight, gradient and optimizer bytes are those that real ranks over gloo allocate."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from megatron.core import parallel_state

from megatron_nvlm.estimate.ranks import build_ranks
from megatron_nvlm.estimate.state_bytes import StateBytes, state_bytes
from megatron_nvlm.models.build import build_chunks
from megatron_nvlm.models.config import ResolvedModel, resolve_model
from megatron_nvlm.models.initialise import initialise, mark_splits
from megatron_nvlm.models.lora import LoraConfig
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.precision import PRECISIONS, Precision
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import get_groups, get_single_rank_groups, start_groups
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.step import wrap_model
from megatron_nvlm.training.trainable import RECIPES, freeze
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config

pytestmark = pytest.mark.distributed

ALL_PARTS = ("vision_model", "vision_projection", "cross_attention", "language_model")


@dataclass(frozen=True)
class Case:
    """A layout with what is trained on it."""

    ranks: int
    parallelism: ParallelismConfig
    variant: str
    trainable: tuple[str, ...]
    precision: Precision
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def model(self) -> ResolvedModel:
        return resolve_model(replace(tiny_config(self.variant), lora=self.lora))


CASES = {
    "one rank": Case(1, ParallelismConfig(), "h", ALL_PARTS, PRECISIONS["fp32"]),
    "TP=2 with SP": Case(
        2,
        ParallelismConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        "x",
        RECIPES["sft"],
        PRECISIONS["bf16"],
    ),
    "PP=2": Case(2, ParallelismConfig(pipeline_model_parallel_size=2), "d", RECIPES["sft"], PRECISIONS["bf16"]),
    "PP=2, encoder trains, plain optimizer": Case(
        2,
        ParallelismConfig(pipeline_model_parallel_size=2, use_distributed_optimizer=False),
        "h",
        ALL_PARTS,
        PRECISIONS["bf16"],
    ),
    "DP=2": Case(2, ParallelismConfig(), "x", RECIPES["pretrain"], PRECISIONS["bf16"]),
    "DP=2 x TP=2": Case(4, ParallelismConfig(tensor_model_parallel_size=2), "h", RECIPES["sft"], PRECISIONS["bf16"]),
    "PP=2, replicated encoder that trains": Case(
        2,
        ParallelismConfig(pipeline_model_parallel_size=2, vision_placement="replicated"),
        "h",
        ALL_PARTS,
        PRECISIONS["fp32"],
    ),
    "TP=2, tensor-parallel encoder": Case(
        2,
        ParallelismConfig(tensor_model_parallel_size=2, vision_placement="tensor_parallel"),
        "x",
        ALL_PARTS,
        PRECISIONS["bf16"],
    ),
    "TP=2 with SP, adapters": Case(
        2,
        ParallelismConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        "x",
        ("vision_projection", "cross_attention", "lora"),
        PRECISIONS["bf16"],
        LoraConfig(rank=3),
    ),
    "PP=2 with two chunks": Case(
        2,
        ParallelismConfig(
            pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, payload_vision_tokens=64
        ),
        "d",
        RECIPES["sft"],
        PRECISIONS["fp32"],
    ),
}


@dataclass(frozen=True)
class Measured:
    """What one real rank holds after a step."""

    place: tuple[int, int, int]
    state: StateBytes


def measure(case: Case) -> Measured:
    """Make one update (Adam makes its state then) and add up the storages; runs on every rank."""
    device = use_device()
    start_groups(case.parallelism, device, seed=1)
    model = build_chunks(
        case.model,
        case.parallelism,
        get_groups(),
        get_single_rank_groups(),
        case.precision.parameter_dtype,
        device.torch_device,
    )
    mark_splits(model)
    initialise(model, seed=1)
    freeze(model, case.trainable)
    wrapped = wrap_model(model, case.precision, case.parallelism.use_distributed_optimizer)
    settings = OptimizerConfig(max_lr=1e-3, min_lr=1e-4, warmup_steps=1)
    optimizer, _ = build_optimizer(settings, wrapped, 10, case.precision, case.parallelism.use_distributed_optimizer)
    optimizer.step()
    weights = _storage_bytes([parameter.data for parameter in model.parameters()])
    gradients = _storage_bytes([parameter.main_grad for parameter in model.parameters() if parameter.requires_grad])
    state = [tensor for inner in _inner_optimizers(optimizer) for tensor in _state_tensors(inner)]
    weight_storages = {parameter.data.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = [tensor for tensor in state if tensor.untyped_storage().data_ptr() not in weight_storages]
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    parallel_state.destroy_model_parallel()
    return Measured(place, StateBytes(weights, gradients, _storage_bytes(kept)))


def measure_all(cases: list[Case]) -> list[Measured]:
    return [measure(case) for case in cases]


def _inner_optimizers(optimizer):  # type: ignore[no-untyped-def]
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one.optimizer for one in chained if one.optimizer is not None]


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Moments, steps, and what the optimizer updates (float32 copies, or the weights themselves)."""
    updated = [parameter.data for group in optimizer.param_groups for parameter in group["params"]]
    return updated + [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]


def _storage_bytes(tensors: list[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def predict(case: Case) -> dict[tuple[int, int, int], StateBytes]:
    """By (stage, tensor-parallel rank, data-parallel rank); runs in a process that is in no group."""
    ranks = build_ranks(
        case.model,
        case.parallelism,
        case.ranks,
        case.precision.parameter_dtype,
        case.trainable,
    )
    replicas = case.parallelism.data_parallel_size(case.ranks)
    distributed = case.parallelism.use_distributed_optimizer
    return {
        (rank.stage, rank.tensor_rank, replica): state_bytes(rank, case.precision, replica, replicas, distributed)
        for rank in ranks
        for replica in range(replicas)
    }


def predict_all() -> dict[str, dict[tuple[int, int, int], StateBytes]]:
    return {name: predict(case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def predictions() -> dict[str, dict[tuple[int, int, int], StateBytes]]:
    return run_ranks(1, predict_all)[0]


@pytest.mark.parametrize("ranks", sorted({case.ranks for case in CASES.values()}))
def test_bytes_are_those_of_real_ranks(
    ranks: int, predictions: dict[str, dict[tuple[int, int, int], StateBytes]]
) -> None:
    names = [name for name, case in CASES.items() if case.ranks == ranks]
    by_rank = run_ranks(ranks, measure_all, [CASES[name] for name in names])
    for number, name in enumerate(names):
        measured = {results[number].place: results[number].state for results in by_rank}
        assert measured == predictions[name], name
