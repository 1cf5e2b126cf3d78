"""Ranks that decode shares of a step's tiles: together they give what one loader gives, whatever is broken."""

import io
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import megatron_nvlm.data.prepare
from megatron_nvlm.data.loading.fetch import BadRecord
from megatron_nvlm.data.loading.loader import Loader, MicroBatchLoader
from megatron_nvlm.data.loading.shared_decoding import Found, SharingLoader, TileShare
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.data.shards.records import describe_images
from megatron_nvlm.image.pixels import decode_image
from megatron_nvlm.image.tiling import Grid
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import start_groups
from megatron_nvlm.runs.trainer import tile_share
from megatron_nvlm.sequence.micro_batch import MicroBatch
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.loaders import counted_samples, loader_arguments
from tests.support.ranks import run_ranks
from tests.support.shards import Sample, cut_sample, good_samples, picture, record

STEPS = 4
Step = tuple[list[MicroBatch], list[BadRecord]]


def broken_samples() -> list[Sample]:
    """Each bad in another way; only the first four need decoding to be known, and the first is bad in several places."""
    cut, pictures = cut_sample(Grid(3, 1))
    missing = {name: data for name, data in pictures.items() if "tile_2" not in name}
    half = {name: data[:300] if "tile_3" in name else data for name, data in pictures.items()}
    tiles = cut_sample(Grid(2, 2), Grid(2, 2))
    return [
        (tiles[0], {name: picture(10, 10, "JPEG") for name in tiles[1]}),
        (record("?", "half a picture"), {"0.jpg": picture(168, 112, "JPEG")[:2000]}),
        (cut, missing),
        (cut, half),
        (record("?", "no header"), {"0.jpg": b"none"}),
        (record("word " * 400, "too long"), {"0.png": picture(90, 90)}),
        ({"conversation": "none", "images": []}, {}),
    ]


def write(folder: Path, samples: list[Sample]) -> Path:
    return counted_samples(folder, samples, Tokenizer(qwen2_tokenizer(1024)))


def arguments(folder: Path, packed: bool, **settings: Any) -> tuple[Any, ...]:
    return loader_arguments(folder, Tokenizer(qwen2_tokenizer(1024)), packed=packed, **settings)


def draw(loader: Loader) -> list[Step]:
    position, steps = DataPosition(), []
    for _ in range(STEPS):
        steps.append((list(loader.step(position)), loader.bad))
        position = loader.after(position)
    loader.close()
    return steps


def draw_whole(folder: Path, packed: bool) -> list[Step]:
    return draw(MicroBatchLoader(*arguments(folder, packed)))


def check(shares: list[list[Step]], whole: list[Step]) -> None:
    """Shares differ by one tile at most, and put together are the whole; all ranks know what was bad."""
    for number, (rows, bad) in enumerate(whole):
        steps = [share[number] for share in shares]
        counts = [sum(len(row.tiles) for row in own) for own, _ in steps]
        assert max(counts) - min(counts) <= 1 and sum(counts) == sum(len(row.tiles) for row in rows)
        for _, found in steps:
            assert found == bad
        for place, row in enumerate(rows):
            parts = [own[place] for own, _ in steps]
            for part in parts:
                same = set(vars(row)) - {"tiles", "first_tile"}
                for name in same:
                    one, two = getattr(part, name), getattr(row, name)
                    assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, name
            held = sorted((part for part in parts if len(part.tiles)), key=lambda part: part.first_tile)
            assert sum(([*range(p.first_tile, p.first_tile + len(p.tiles))] for p in held), []) == [
                *range(row.num_tiles)
            ]
            if held:
                assert torch.equal(torch.cat([part.tiles for part in held]), row.tiles)


def make_share(share: TileShare, folder: Path, packed: bool, **settings: Any) -> SharingLoader:
    return SharingLoader(share, *arguments(folder, packed, **settings))


def draw_by_threads(ranks: int, folder: Path, packed: bool) -> list[list[Step]]:
    """Each rank in a thread of its own; they tell each other by way of a shared list."""
    barrier, told = threading.Barrier(ranks), [[] for _ in range(ranks)]  # type: list[list[Found]]

    def gather(number: int, found: list[Found]) -> list[Found]:
        told[number] = found
        barrier.wait(20)
        everything = [one for of_rank in told for one in of_rank]
        barrier.wait(20)
        return everything

    # Opened here, since numpy's reader of headers fails now and then in threads of Python 3.11.
    loaders = [make_share(TileShare(number, ranks, partial(gather, number)), folder, packed) for number in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(draw, loaders))


@cache  # no fixture, which hypothesis would print
def kinds() -> tuple[list[Sample], list[Sample]]:
    return good_samples(8) + [cut_sample(Grid(2, 2)), cut_sample(Grid(1, 1), Grid(1, 3))], broken_samples()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 16), min_size=4, max_size=24),
    st.integers(1, 5),
    st.booleans(),
)
def test_shares_make_up_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    chosen: list[int],
    ranks: int,
    packed: bool,
) -> None:
    good, broken = kinds()
    every = [*good, *broken]
    folder = write(tmp_path_factory.mktemp("shards") / "set", [every[number] for number in chosen])
    check(draw_by_threads(ranks, folder, packed), draw_whole(folder, packed))


def draw_on_rank(parallelism: ParallelismConfig, folder: Path, packed: bool, settings: dict[str, Any]) -> list[Step]:
    device = use_device()
    start_groups(parallelism, device, seed=1)
    return draw(make_share(tile_share(device), folder, packed, **settings))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("packed", "settings"),
    [
        (False, {"num_workers": 2}),
        (True, {"num_workers": 1, "prefetch_samples": 1}),  # room for one sample at a time
    ],
)
def test_processes_with_workers_make_up_the_whole(tmp_path: Path, packed: bool, settings: dict[str, Any]) -> None:
    good, broken = kinds()
    samples = 2 * good + broken
    random.Random(3).shuffle(samples)
    folder = write(tmp_path / "set", samples)
    parallelism = ParallelismConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    whole = draw_whole(folder, packed)
    assert {bad.kind for _, found in whole for bad in found} == {"image", "too_long", "conversation"}
    check(run_ranks(4, draw_on_rank, parallelism, folder, packed, settings), whole)


def count_decodes(parallelism: ParallelismConfig, folder: Path) -> tuple[int, int]:
    """Images that this rank decodes of one step, and tiles of its share."""
    start_groups(parallelism, use_device(), seed=1)
    decoded = 0
    decode = megatron_nvlm.data.prepare.decode_image

    def counting(data: bytes, background: str | None = None) -> Image.Image:
        nonlocal decoded
        decoded += 1
        return decode(data, background)

    megatron_nvlm.data.prepare.decode_image = counting
    loader = make_share(tile_share(use_device()), folder, packed=False)
    tiles = sum(len(row.tiles) for row in loader.step(DataPosition()))
    return decoded, tiles


@pytest.mark.distributed
@pytest.mark.parametrize("cut", [False, True])
def test_a_rank_decodes_its_share_alone(tmp_path: Path, cut: bool) -> None:
    """Seven images of five tiles on two ranks. Both decode the middle one, but of tiles cut in advance only their own."""
    image = cut_sample(Grid(2, 2)) if cut else (record("?", "!"), {"0.png": picture(112, 112)})
    folder = write(tmp_path / "set", [image] * 7 + [(record("?", "!", images=0), {})])
    seen = run_ranks(2, count_decodes, ParallelismConfig(pipeline_model_parallel_size=2), folder)
    assert seen == ([(17, 17), (18, 18)] if cut else [(4, 17), (4, 18)])


def test_a_step_left_half_way_is_begun_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", good_samples(24))
    whole = draw_whole(folder, packed=False)
    for workers in (0, 1):
        loader = make_share(TileShare(0, 1, lambda found: found), folder, packed=False, num_workers=workers)
        next(loader.step(DataPosition(8)))
        next(loader.step(DataPosition(16)))
        check([draw(loader)], whole)


def test_sizes_of_images_are_measured_as_they_are_decoded() -> None:
    """Whatever the format and the way it is turned: rows follow from the measured size."""
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[274] = orientation
            buffer = io.BytesIO()
            Image.new("RGB", (90, 60)).save(buffer, kind, exif=exif)
            (described,) = describe_images({"images": [{}]}, {"0.img": buffer.getvalue()})
            assert (described.width, described.height) == decode_image(buffer.getvalue()).size, (kind, orientation)
