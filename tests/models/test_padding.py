"""The encoder split over tensor-parallel ranks, whatever its number of heads: same features, same gradients, and
checkpoints that any placement writes and reads."""

import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import dist_checkpointing, parallel_state

from megatron_nvlm.models.build import build_vision, vision_heads
from megatron_nvlm.models.config import ModelConfig
from megatron_nvlm.models.families.vision_family import VisionPreset
from megatron_nvlm.models.families.visions import VISION_PRESETS
from megatron_nvlm.models.padding import Padding, pad_evenly
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.sharding import Split, cut, find_split, full_shape, gather_parts, join
from megatron_nvlm.models.vision_model import VisionModel
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import get_groups, get_single_rank_groups, start_groups
from tests.support.ranks import run_ranks

# Five heads for 1, 2, 3, 4 and 8 ranks; 48 feed-forward columns, which all of them divide.
PRESETS = {
    "6B family": VisionPreset(2, 40, 48, 5, "RMSNorm", qk_norm=True, qkv_bias=False, tile_size=56),
    "300M family": VisionPreset(2, 40, 48, 5, "LayerNorm", qk_norm=False, qkv_bias=True, tile_size=56),
    # 3 x 3 patches of 18 pixels
    "SigLIP": VisionPreset(
        2, 40, 48, 5, "LayerNorm", qk_norm=False, qkv_bias=True, tile_size=56, patch_size=18, family="siglip"
    ),
}
CONFIG = ModelConfig("d", "tiny", "tiny")


@pytest.mark.parametrize(("ranks", "padded"), [(1, 25), (2, 26), (3, 27), (4, 28), (8, 32), (5, 25)])
def test_heads_of_the_6b_model_are_padded_to_a_multiple_of_the_ranks(ranks: int, padded: int) -> None:
    heads = VISION_PRESETS["internvit_6b"].num_attention_heads
    assert pad_evenly(heads, ranks) == Padding(25, padded)


@given(st.integers(1, 9), st.integers(1, 8), st.integers(1, 3), st.integers(0, 1))
def test_what_is_cut_is_joined_again(heads: int, ranks: int, size: int, dim: int) -> None:
    full = torch.randn(heads * size, heads * size)
    split = Split(dim, padding=pad_evenly(heads, ranks))
    parts = [cut(full, split, rank, ranks) for rank in range(ranks)]
    assert len({part.shape for part in parts}) == 1
    assert full_shape(parts[0].shape, split, ranks) == list(full.shape)
    torch.testing.assert_close(join(parts, split), full, rtol=0, atol=0)


def parallelism_of(placement: str, ranks: int) -> ParallelismConfig:
    return ParallelismConfig(tensor_model_parallel_size=ranks, vision_placement=placement)


def make_encoder(preset: VisionPreset, placement: str, seed: int | None) -> VisionModel:
    """With weights that are a function of their name; `seed` None leaves them at 7."""
    groups = get_groups()
    parallelism = parallelism_of(placement, groups.tp.size())
    encoder = build_vision(CONFIG, preset, parallelism, groups, get_single_rank_groups(), torch.float64, on_cpu=True)
    heads = vision_heads(preset, parallelism)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            split = find_split(f"vision_model.{name}", heads)
            if seed is None:
                parameter.fill_(7)
                continue
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            full = 0.3 * torch.randn(full_shape(parameter.shape, split, groups.tp.size()), generator=generator)
            parameter.copy_(
                cut(
                    full + 1.0 * ("norm" in name and name.endswith("weight")), split, groups.tp.rank(), groups.tp.size()
                )
            )
    return encoder


def whole(encoder: VisionModel, heads: Padding | None, of: str) -> dict[str, torch.Tensor]:
    """Weights or gradients of all ranks together, by name."""
    group, found = parallel_state.get_tensor_model_parallel_group(), {}
    for name, parameter in encoder.named_parameters():
        part = parameter.detach() if of == "weights" else parameter.grad
        assert part is not None
        parts = gather_parts(part, group)
        split = find_split(f"vision_model.{name}", heads)
        if split is not None and split.padding is not None:
            padded = torch.cat(parts, split.dim)
            behind = padded.shape[split.dim] // split.padding.padded * split.padding.real
            if of == "gradients":
                assert not padded.narrow(split.dim, behind, padded.shape[split.dim] - behind).any(), name
        found[name] = join(parts, split)
    return found


def encode(family: str, ranks: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features and gradients of a tensor-parallel encoder."""
    use_device()
    start_groups(parallelism_of("tensor_parallel", ranks), use_device(), seed=1)
    preset = PRESETS[family]
    encoder = make_encoder(preset, "tensor_parallel", seed=5)
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(2)).double()
    features = encoder(pixels)
    features.square().sum().backward()
    return features.detach(), whole(
        encoder, vision_heads(preset, parallelism_of("tensor_parallel", ranks)), "gradients"
    )


@pytest.fixture(scope="module")
def one_rank() -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    return {family: run_ranks(1, encode, family, 1)[0] for family in PRESETS}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "ranks"),
    [
        ("6B family", 2),
        ("SigLIP", 2),
        pytest.param("6B family", 3, marks=pytest.mark.slow),
        pytest.param("6B family", 4, marks=pytest.mark.slow),
        pytest.param("6B family", 8, marks=pytest.mark.slow),
        pytest.param("300M family", 4, marks=pytest.mark.slow),
    ],
)
def test_a_split_encoder_computes_what_a_whole_one_does(one_rank, family: str, ranks: int) -> None:  # type: ignore[no-untyped-def]
    expected, expected_gradients = one_rank[family]
    for features, gradients in run_ranks(ranks, encode, family, ranks):
        torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            reference = expected_gradients[name]
            assert (gradient - reference).norm() <= 1e-9 * reference.norm(), name
            assert reference.norm() > 0, name


def metadata() -> dict[str, object]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"singleton_local_shards": False, "dp_cp_group": group}


def save(folder: Path, placement: str, ranks: int) -> None:
    start_groups(parallelism_of(placement, ranks), use_device(), seed=1)
    encoder = make_encoder(PRESETS["6B family"], placement, seed=9)
    dist_checkpointing.save({"model": encoder.sharded_state_dict("vision_model.", metadata=metadata())}, str(folder))


def load(folder: Path, placement: str, ranks: int) -> dict[str, torch.Tensor]:
    parallelism = parallelism_of(placement, ranks)
    start_groups(parallelism, use_device(), seed=1)
    encoder = make_encoder(PRESETS["6B family"], placement, seed=None)
    state = encoder.sharded_state_dict("vision_model.", metadata=metadata())
    loaded = dist_checkpointing.load({"model": state}, str(folder))["model"]
    encoder.load_state_dict({name.removeprefix("vision_model."): value for name, value in loaded.items()})
    return whole(encoder, vision_heads(PRESETS["6B family"], parallelism), "weights")


def names_and_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    return {key: tuple(tensor.global_shape) for key, tensor in stored.items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        (("tensor_parallel", 2), ("replicated", 1)),
        pytest.param(("replicated", 1), ("tensor_parallel", 4), marks=pytest.mark.slow),
        pytest.param(("tensor_parallel", 8), ("tensor_parallel", 3), marks=pytest.mark.slow),
        pytest.param(("first_stage", 2), ("tensor_parallel", 2), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_holds_real_heads_and_loads_under_any_placement(
    tmp_path: Path, writer: tuple[str, int], reader: tuple[str, int]
) -> None:
    run_ranks(writer[1], save, tmp_path, *writer)
    reference = tmp_path / "reference"
    reference.mkdir()
    run_ranks(1, save, reference, "replicated", 1)
    assert names_and_shapes(tmp_path) == names_and_shapes(reference)
    expected = run_ranks(1, load, reference, "replicated", 1)[0]
    for weights in run_ranks(reader[1], load, tmp_path, *reader):
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)
            assert not (weight == 7).any(), name
