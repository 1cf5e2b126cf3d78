"""The loader: what it gives depends on the position alone; workers, replicas and bad samples change nothing else."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nvlm.data.loading.builder import BatchSettings
from megatron_nvlm.data.loading.loader import MicroBatchLoader
from megatron_nvlm.data.loading.tile_memory import Ring
from megatron_nvlm.data.loading.worker_pool import WorkerPool
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.data.order.lengths import TextTokenCounter
from megatron_nvlm.errors import UserError
from megatron_nvlm.sequence.micro_batch import MicroBatch
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.launch import environment
from tests.support.loaders import counted_samples, loader_arguments
from tests.support.shards import good_samples, picture, record, write_samples


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(qwen2_tokenizer(1024))


@contextmanager
def make_loader(
    folder: Path, tokenizer: Tokenizer, replica: tuple[int, int] = (0, 1), packed: bool = False, **settings: Any
) -> Iterator[MicroBatchLoader]:
    loader = MicroBatchLoader(*loader_arguments(folder, tokenizer, replica, packed, **settings))
    try:
        yield loader
    finally:
        loader.close()


def draw(loader: MicroBatchLoader, position: DataPosition, steps: int) -> list[list[MicroBatch]]:
    drawn = []
    for _ in range(steps):
        drawn.append(list(loader.step(position)))
        position = loader.after(position)
    return drawn


def keys_of(steps: list[list[MicroBatch]]) -> list[str]:
    return [key for step in steps for micro_batch in step for key in micro_batch.keys]


def assert_equal(one: list[list[MicroBatch]], two: list[list[MicroBatch]]) -> None:
    assert keys_of(one) == keys_of(two)
    for first, second in zip(sum(one, []), sum(two, []), strict=True):
        for name, value in vars(first).items():
            other = getattr(second, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


@pytest.mark.parametrize("packed", [False, True])
def test_workers_and_history_change_nothing(tmp_path: Path, tokenizer: Tokenizer, packed: bool) -> None:
    folder = counted_samples(tmp_path / "shards", good_samples(24), tokenizer)
    with make_loader(folder, tokenizer, packed=packed) as plain:
        expected = draw(plain, DataPosition(), 6)
        middle = plain.after(plain.after(DataPosition()))
        last = plain.after(plain.after(middle))
    for form in ({"num_workers": 1}, {"num_workers": 2, "prefetch_samples": 3}, {"num_workers": 2}):
        with make_loader(folder, tokenizer, packed=packed, **form) as loader:
            assert_equal(draw(loader, DataPosition(), 3), expected[:3])
            assert_equal(draw(loader, last, 2), expected[4:6])
            next(loader.step(middle))  # left half-way
            assert_equal(draw(loader, middle, 2), expected[2:4])
    if not packed:
        assert sorted(keys_of(expected[:3])) == [f"sample_{number:04d}" for number in range(24)]


@pytest.mark.parametrize("packed", [False, True])
def test_replicas_share_the_rows_of_a_step(tmp_path: Path, tokenizer: Tokenizer, packed: bool) -> None:
    folder = counted_samples(tmp_path / "shards", good_samples(24), tokenizer)
    with make_loader(folder, tokenizer, packed=packed) as plain:
        expected = draw(plain, DataPosition(), 5)
    for size in (2, 4):
        shared = []
        for rank in range(size):
            with make_loader(folder, tokenizer, (rank, size), packed=packed) as replica:
                shared.append(draw(replica, DataPosition(), 5))
        rows = [[row for turn in zip(*step, strict=True) for row in turn] for step in zip(*shared, strict=True)]
        assert_equal(rows, expected)


def test_packed_rows_fit_and_hold_every_sample_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = counted_samples(tmp_path / "shards", good_samples(30), tokenizer)
    with make_loader(folder, tokenizer, packed=True) as loader:
        position, rows = DataPosition(), []
        while position.consumed_samples % 30 or position.packs_taken or not rows:
            step = list(loader.step(position))
            rows += step
            position = loader.after(position)
            assert position.consumed_samples <= 30 * 12
        assert all(len(row.tokens) <= 256 for row in rows)
        keys = [key for row in rows for key in row.keys]
        assert len(keys) == position.consumed_samples
        assert sorted(keys) == sorted(
            [f"sample_{number:04d}" for number in range(30)] * (position.consumed_samples // 30)
        )
        assert len(rows) < position.consumed_samples / 2, "several samples share a row"
    data, _, config = loader_arguments(tmp_path / "shards", tokenizer, packed=True)
    with pytest.raises(ValueError, match="impossible batch sizes"):
        MicroBatchLoader(data, BatchSettings(2, 4), config)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_sample_leaves_its_place_empty(
    tmp_path: Path, tokenizer: Tokenizer, packed: bool, num_workers: int
) -> None:
    samples = good_samples(20)
    samples[5] = (record("?", "2") | {"source": "scans"}, {"0.jpg": picture(90, 90, "JPEG")[:600]})
    samples[6] = (record("word " * 400, "long"), {"0.png": picture(90, 90)})
    samples[11] = ({"conversation": "none", "images": [], "source": "chat"}, {})
    folder = counted_samples(tmp_path / "shards", samples, tokenizer)
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1  # in the JSON of sample 8
    path.write_bytes(data)
    with make_loader(folder, tokenizer, packed=packed, num_workers=num_workers) as loader:
        position, keys, bad = DataPosition(), [], []
        while position.consumed_samples < 20:
            keys += [key for row in loader.step(position) for key in row.keys]
            bad += loader.bad
            position = loader.after(position)
    good = {f"sample_{number:04d}" for number in range(20)} - {f"sample_{number:04d}" for number in (5, 6, 8, 11)}
    first_epoch = [found for found in bad][:4]
    assert set(keys) == good and sorted(keys[: len(good)]) == sorted(good)
    assert {(found.number, found.kind, found.source) for found in first_epoch} == {
        (5, "image", "scans"),
        (6, "too_long", "test"),
        (8, "record", "shards"),
        (11, "conversation", "chat"),
    }
    assert {found.shard for found in first_epoch} == {"shard-000000.tar", "shard-000001.tar"}


def test_a_row_of_bad_samples_is_a_row_without_target(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = counted_samples(tmp_path / "shards", [(record("?", "2"), {"0.jpg": b"none"})] * 8, tokenizer)
    data, batch, config = loader_arguments(folder, tokenizer)
    with closing(MicroBatchLoader(data, replace(batch, token_multiple=4), config)) as loader:
        rows = list(loader.step(DataPosition()))
    assert len(rows) == 4 and len(loader.bad) == 8
    assert all(row.keys == () and row.loss_mask.sum() == 0 and len(row.tokens) == 4 for row in rows)


def test_an_index_that_promises_other_rows_is_no_excuse_for_too_long_a_row(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Text counted one token short, as by an index of other data."""
    counter = TextTokenCounter(tokenizer, "chatml", None)
    folder = write_samples(
        tmp_path / "shards", good_samples(10), count_text=lambda r: counter(r) - 1, text=counter.description
    )
    with make_loader(folder, tokenizer, packed=True) as loader:
        list(loader.step(DataPosition()))
        assert loader.bad and {found.kind for found in loader.bad} == {"index"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_ends_the_run_with_a_sentence(
    tmp_path: Path, tokenizer: Tokenizer, how: signal.Signals
) -> None:
    folder = counted_samples(tmp_path / "shards", good_samples(24), tokenizer)
    with make_loader(folder, tokenizer, num_workers=2) as loader:
        draw(loader, DataPosition(), 1)
        assert isinstance(loader.builder.preparers, WorkerPool)
        os.kill(loader.builder.preparers.process_ids[1], how)
        with pytest.raises(UserError, match=rf"the loader worker \d+ was killed by signal {int(how)} "):
            draw(loader, DataPosition(8), 50)


def test_workers_end_with_the_loader_and_ignore_signals_to_the_job(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = counted_samples(tmp_path / "shards", good_samples(24), tokenizer)
    with make_loader(folder, tokenizer, num_workers=2) as loader:
        draw(loader, DataPosition(), 1)
        assert isinstance(loader.builder.preparers, WorkerPool)
        workers = loader.builder.preparers.process_ids
        for worker in workers:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(worker, number)
        draw(loader, DataPosition(8), 2)
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(psutil.pid_exists(worker) for worker in workers)


def test_a_shard_that_vanishes_stops_the_run(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a bad sample: on another machine it may be there, and ranks would see different rows."""
    monkeypatch.setattr("megatron_nvlm.data.shards.read.PAUSES", (0.01,))
    folder = counted_samples(tmp_path / "shards", good_samples(24), tokenizer)
    with make_loader(folder, tokenizer) as loader:
        (folder / "shard-000001.tar").unlink()
        with pytest.raises(UserError, match=r"shard-000001.tar cannot be read \(.*No such file"):
            draw(loader, DataPosition(), 3)


def test_a_worker_needs_neither_torch_nor_core() -> None:
    modules = "{name.split('.')[0] for name in sys.modules}"
    script = f"import sys, megatron_nvlm.data.loading.worker; assert not {{'torch', 'megatron'}} & {modules}"
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=60), st.randoms(use_true_random=False))
def test_blocks_of_shared_memory_never_overlap(steps: list[tuple[int, bool]], rng: random.Random) -> None:
    ring, held = Ring(100), {}
    for size, frees in steps:
        if frees and held:
            start = rng.choice(sorted(held))
            ring.free(start)
            del held[start]
        start = ring.take(size)
        if start is None:
            assert held, "an empty ring has room for any block up to its size"
            continue
        assert 0 <= start and start + size <= 100
        assert all(start + size <= other or other + length <= start for other, length in held.items())
        held[start] = size
    for start in list(held):
        ring.free(start)
    assert ring.take(100) == 0 and ring.take(101) is None
