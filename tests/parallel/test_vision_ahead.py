"""Tiles of a step, shared by a replica: even shares, bounded memory, features where they belong."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import start_groups
from megatron_nvlm.parallel.vision_ahead import SpreadVision, _tiles_between
from megatron_nvlm.sequence.micro_batch import MicroBatch
from tests.support.batches import Draw, MicroBatchSamples
from tests.support.equality import Case, Layout, layout, make_chunks
from tests.support.ranks import run_ranks
from tests.support.tiny import micro_batch_of

TILES_AT_ONCE = 2
# Tiles by micro-batch: uneven, fewer than ranks, one, none.
STEPS: dict[str, list[int]] = {"uneven": [6, 0, 1, 5], "two": [0, 2, 0, 0], "one": [1, 0, 0, 0], "none": [0, 0, 0, 0]}


def samples_of(tiles: list[int]) -> list[MicroBatchSamples]:
    draw = Draw(7)
    return [[draw.picture(count) if count else draw.words()] for count in tiles]


@dataclass(frozen=True)
class Seen:
    """Of one rank and step."""

    own_tiles: int
    largest_at_once: int
    worst: float
    """Distance of the features from those of a whole encoder fed micro-batch by micro-batch, on the first stage."""


def spread(own: Layout) -> dict[str, Seen]:
    device = use_device()
    start_groups(own.parallelism, device, seed=1)
    chunk = make_chunks(Case("d", "mixed"), own, device.torch_device).first
    found = {}
    for name, tiles in STEPS.items():
        micro_batches = [micro_batch_of(samples, "d") for samples in samples_of(tiles)]
        sizes: list[int] = []
        assert chunk.vision_model is not None
        handle = chunk.vision_model.register_forward_pre_hook(
            lambda module, args, sizes=sizes: sizes.append(len(args[0]))
        )
        vision = SpreadVision(chunk, micro_batches, device.torch_device)
        features = vision.encode()
        handle.remove()
        worst = 0.0
        for micro_batch, got in zip(micro_batches, features, strict=True):
            assert (got is not None) == chunk.pre_process
            if got is not None and len(micro_batch.tiles):
                with torch.no_grad():
                    worst = max(worst, float((got - chunk.encode_tiles(micro_batch.tiles)).abs().max()))
            elif got is not None:
                assert len(got) == 0
        found[name] = Seen(len(vision.own_tiles), max(sizes, default=0), worst)
    return found


@pytest.mark.distributed
def test_shares_are_even_and_memory_is_bounded() -> None:
    ranks = run_ranks(4, spread, layout(4, tp=2, pp=2, vision="replicated", tiles=TILES_AT_ONCE))
    for name, tiles in STEPS.items():
        pictures = sum(count + (count > 1) for count in tiles)
        seen = [rank[name] for rank in ranks]
        assert sum(rank.own_tiles for rank in seen) == pictures
        assert max(rank.own_tiles for rank in seen) - min(rank.own_tiles for rank in seen) <= 1
        assert max(rank.largest_at_once for rank in seen) <= TILES_AT_ONCE
        assert max(rank.worst for rank in seen) <= 1e-12


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.booleans(), st.data())
def test_a_range_of_tiles_runs_over_micro_batches(counts: list[int], whole: bool, data: st.DataObject) -> None:
    """Whether micro-batches hold all of their tiles or those of the range alone."""
    total = sum(counts)
    start = data.draw(st.integers(0, total))
    end = data.draw(st.integers(start, total))
    before, micro_batches = 0, []
    for count in counts:
        first, last = (0, count) if whole else (max(start - before, 0), max(min(end - before, count), 0))
        tiles = torch.arange(before + first, before + max(first, last))
        nothing = torch.zeros(0)
        micro_batches.append(
            MicroBatch(
                *[nothing] * 8,
                context_intervals=torch.zeros(0, 2, dtype=torch.int32),
                tiles=tiles,
                keys=(),
                num_tiles=count,
                first_tile=first if len(tiles) else 0,
            )
        )
        before += count
    assert _tiles_between(micro_batches, start, end).tolist() == list(range(start, end))
