"""Every layout computes what one process computes: loss and every gradient in float64, gates away from zero."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_nvlm.models.initialise import named_parameters
from megatron_nvlm.models.partition import PartitionConfig
from megatron_nvlm.models.sharding import find_split, join
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import start_groups
from megatron_nvlm.training.step import run_step, wrap_model
from tests.support.ranks import run_ranks
from tests.support.tiny import micro_batch_of, plain_samples, tiny_config, tiny_model

pytestmark = pytest.mark.distributed

MODELS = (("d", False), ("x", False), ("h", False), ("h", True))


@dataclass(frozen=True)
class Result:
    """Loss and gradients of one rank's stage, whole tensors by name."""

    loss_sum: float
    num_targets: float
    gradients: dict[str, torch.Tensor]


def whole_gradients(partition: PartitionConfig) -> list[Result]:
    """One step without an update for each model; runs on every rank of the layout."""
    device = use_device()
    start_groups(partition, device, seed=1)
    results = []
    for variant, qk_norm in MODELS:
        model = tiny_model(tiny_config(variant, qk_norm), device, partition)
        wrapped = wrap_model(model, use_distributed_optimizer=False)
        replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        micro_batches = [micro_batch_of(samples, variant, partition.row_multiple) for samples in plain_samples()]
        own = micro_batches[replica::replicas]
        step = run_step(wrapped, iter(own), len(own), device.torch_device, optimizer=None)
        sums = torch.tensor([step.loss_sum, step.num_targets], dtype=torch.float64)
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        group = parallel_state.get_tensor_model_parallel_group()
        gradients = {}
        for name, parameter in named_parameters(model):
            parts = [torch.empty_like(parameter.main_grad) for _ in range(group.size())]
            dist.all_gather(parts, parameter.main_grad.contiguous(), group=group)
            split = find_split(name)
            if split is None:
                for part in parts[1:]:
                    torch.testing.assert_close(part, parts[0], rtol=1e-9, atol=1e-12, msg=f"{name} differs by rank")
            gradients[name] = join(parts, split).clone()
        results.append(Result(sums[0].item(), sums[1].item(), gradients))
    return results


@pytest.fixture(scope="module")
def one_process() -> list[Result]:
    return run_ranks(1, whole_gradients, PartitionConfig())[0]


LAYOUTS = {
    "TP=2": (2, PartitionConfig(tensor_model_parallel_size=2)),
    "TP=2 with SP": (2, PartitionConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP=2": (2, PartitionConfig(pipeline_model_parallel_size=2)),
    "DP=2": (2, PartitionConfig()),
    "TP=2 with SP, PP=2": (
        4,
        PartitionConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_every_gradient_equal_one_process(one_process: list[Result], layout: str) -> None:
    ranks = run_ranks(*LAYOUTS[layout][:1], whole_gradients, LAYOUTS[layout][1])
    for number, expected in enumerate(one_process):
        merged: dict[str, torch.Tensor] = {}
        for results in ranks:
            merged |= results[number].gradients
        loss = max(results[number].loss_sum for results in ranks)
        targets = max(results[number].num_targets for results in ranks)
        assert targets == expected.num_targets
        assert loss == pytest.approx(expected.loss_sum, rel=1e-9)
        assert merged.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert gradient.norm() > 0, name
            difference = (merged[name] - gradient).norm() / gradient.norm()
            assert difference <= 1e-9, f"{MODELS[number]} {layout}: {name} differs by {difference:.1e}"
