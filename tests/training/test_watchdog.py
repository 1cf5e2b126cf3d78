"""A run that hangs says where and ends: every rank, the stopped one too, within a minute of the timeout."""

import datetime
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import start_groups
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training.watchdog import Watchdog
from tests.support.launch import start
from tests.support.ranks import run_ranks
from tests.support.shards import write_run

pytestmark = pytest.mark.distributed

TIMEOUT = 15


def ranks_of(launcher: int) -> dict[int, int]:
    """Process ids of a launcher's ranks."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        rank = [variable.removeprefix(b"RANK=") for variable in variables if variable.startswith(b"RANK=")]
        if parent == launcher and rank:
            found[int(rank[0])] = int(folder.name)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_stops_is_named_and_all_ranks_end(tmp_path: Path, stopped: int) -> None:
    path = write_run(tmp_path, training={"train_steps": 100_000, "timeout_seconds": TIMEOUT})
    log = tmp_path / "log"
    arguments = ["--config", str(path), "parallelism.pipeline_model_parallel_size=2"]
    process = start("megatron_nvlm.train", 2, *arguments, "checkpoint.save_every_steps=100000", log=log)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    time.sleep(3)  # so that each rank has told the others about a step
    pids = ranks_of(process.pid)
    assert pids.keys() == {0, 1}
    os.kill(pids[stopped], signal.SIGSTOP)
    try:
        status = process.wait(timeout=TIMEOUT + 60)
        assert not [pid for pid in pids.values() if is_alive(pid)]
    finally:
        for pid in pids.values():
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
    said = log.read_text()
    assert status != 0
    sentences = [line for line in said.splitlines() if line.startswith("error: rank")]
    assert len(sentences) == 1, said
    assert sentences[0].startswith(f"error: rank {1 - stopped} (step ")
    assert f"pipeline stage {2 - stopped}" in sentences[0]
    assert f"has waited for {TIMEOUT} s, training.timeout_seconds; rank {stopped} was last heard of" in sentences[0]
    assert f"pipeline stage {1 + stopped}" in sentences[0].split("last heard of")[1]
    assert all("samples sample_0" in half for half in sentences[0].split("last heard of"))


def tell_while_a_thread_waits() -> str:
    """On each of two ranks: rank 0 gives rank 1's thread what it waits for only once it has heard of rank 1."""
    start_groups(ParallelismConfig(), use_device(), seed=1)
    store = distributed_c10d._get_default_store()
    store.set_timeout(datetime.timedelta(seconds=30))
    said = []

    def wait() -> None:
        try:
            store.get("go")
            said.append("heard")
        except dist.DistStoreError:
            said.append("in vain")

    watchdog = Watchdog({"timeout_seconds": 1000}, RunDir(Path.cwd()))
    dist.barrier()
    if dist.get_rank() == 0:
        other = store.clone()
        other.set_timeout(datetime.timedelta(seconds=60))
        other.wait(["watchdog/1"])
        other.set("go", "")
        return "heard"
    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(1)  # until it waits
    watchdog._tell()
    thread.join()
    return said[0]


@pytest.mark.skipif(not hasattr(dist.Store, "clone"), reason="this PyTorch gives a process one connection")
def test_a_rank_is_heard_of_while_another_of_its_threads_waits_for_the_store() -> None:
    assert run_ranks(2, tell_while_a_thread_waits) == ["heard", "heard"]
