"""The quarantine file and the ledger of two replicas: one file each, in the order of the run, cut back on a resume."""

import json
from pathlib import Path

import pytest

from megatron_nvlm.data.loading.builder import BatchSettings
from megatron_nvlm.data.loading.loader import MicroBatchLoader
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.data.order.order import WINDOW_SHARDS
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import start_groups, stop_groups
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from megatron_nvlm.training.sample_files import SampleWriter
from tests.support.loaders import data_config, open_set
from tests.support.ranks import run_ranks
from tests.support.shards import good_samples, picture, record, write_samples

pytestmark = pytest.mark.distributed


def write_two_steps(folder: Path, run_dir: Path) -> list[dict[str, int]]:
    """On each rank: two steps of eight samples."""
    import torch.distributed as dist

    start_groups(ParallelismConfig(), use_device(), seed=1)
    data = open_set(folder, Tokenizer(qwen2_tokenizer(1024)), WINDOW_SHARDS)
    replica = (dist.get_rank(), dist.get_world_size())
    loader = MicroBatchLoader(data, BatchSettings(2, 8, replica), data_config())
    writer = SampleWriter(RunDir(run_dir), 0, with_ledger=True)
    position, counts = DataPosition(), []
    for step in (1, 2):
        keys = tuple(row.keys for row in loader.step(position))
        position = loader.after(position)
        counts.append(writer.write(step, loader, keys, 1))
    writer.close()
    stop_groups()
    return counts


def test_replicas_write_one_file_in_the_order_of_the_run(tmp_path: Path) -> None:
    samples = good_samples(16)
    for number in (5, 6, 9):
        samples[number] = (
            record("?", "2") | {"source": f"scan {number % 2}"},
            {"0.jpg": picture(90, 90, "JPEG")[:600]},
        )
    folder = write_samples(tmp_path / "shards", samples)
    written, counted = {}, {}
    for ranks in (1, 2):
        run_dir = tmp_path / f"run_{ranks}"
        run_dir.mkdir()
        counts = run_ranks(ranks, write_two_steps, folder, run_dir)
        assert all(of_rank == counts[0] for of_rank in counts)
        counted[ranks] = counts[0]
        written[ranks] = RunDir(run_dir).ledger.read_text()
        lines = [json.loads(line) for line in RunDir(run_dir).quarantine.read_text().splitlines()]
        assert sorted(line["number"] for line in lines) == [5, 6, 9]
        assert {line["kind"] for line in lines} == {"image"} and all(line["reason"] for line in lines)
    assert written[1] == written[2] and counted[1] == counted[2]
    total = {key: sum(step.get(key, 0) for step in counted[1]) for key in ("image/scan 0", "image/scan 1")}
    assert total == {"image/scan 0": 1, "image/scan 1": 2}
    keys = [key for line in written[1].splitlines() for key in json.loads(line)["keys"]]
    assert len(keys) == len(set(keys)) == 13
