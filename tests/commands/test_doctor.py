"""The doctor: green on this machine, and the right sentence for each thing that is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nvlm.doctor.findings import Verdict
from megatron_nvlm.doctor.gpus import read_gpus, run_command
from megatron_nvlm.doctor.ranks import Measured, compare
from megatron_nvlm.doctor.storage import check_shared_memory
from megatron_nvlm.exit_codes import UNFIT_NODES
from megatron_nvlm.runs.run_dir import RunDir
from tests.support.launch import command, environment
from tests.support.shards import good_samples, write_run, write_samples

SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(descriptor):
    time.sleep(3)
    fsync(descriptor)
os.fsync = slow
"""
WRONG_CLOCK = """
import os, time
if os.environ.get("LOCAL_RANK", "0") == "0":
    right = time.time
    time.time = lambda: right() + 3600
"""
DOCTOR = "megatron_nvlm.commands.doctor"


def ask(*arguments: object, own: str = "", folder: Path | None = None) -> tuple[int, str]:
    """Exit status and page of the doctor on this machine.

    Args:
        own: code that runs in its process first, kept in `folder`.
    """
    variables = environment()
    if folder is not None:
        (folder / "sitecustomize.py").write_text(own)
        variables["PYTHONPATH"] = f"{folder}{os.pathsep}{variables['PYTHONPATH']}"
    line = [sys.executable, "-m", DOCTOR, *map(str, arguments)]
    done = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def bad_lines(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(Verdict.BAD)]


def test_a_sound_run_on_this_machine_is_green(tmp_path: Path) -> None:
    status, page = ask("--config", write_run(tmp_path))
    assert (status, bad_lines(page)) == (0, []), page
    assert page.splitlines()[-1] == "green: nothing to mend"
    for seen in (
        "megatron-core ",
        "1 sets, 24 samples",
        "valid for 1 ranks",
        "GiB free in",
        "MB/s written and flushed",
    ):
        assert seen in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml", "shards", "tokenizer.json"], (
        "nothing is left"
    )


def test_each_thing_that_is_wrong_has_its_sentence(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    shard = next((tmp_path / "shards").glob("*.tar"))

    def sentence(*arguments: object, own: str = "", folder: Path | None = None) -> str:
        status, page = ask("--config", run, *arguments, own=own, folder=folder)
        assert status == 2, page
        (line,) = bad_lines(page)
        return line

    assert "did you mean optimizer.max_lr?" in sentence("--quick", "optimizer.max_lrr=1")
    assert "start a multiple of 2 ranks" in sentence("--quick", "parallelism.tensor_model_parallel_size=2")
    assert "needs" in (line := sentence("--gpu-memory-gib", "4.01")) and "tools.dry_run --suggest" in line
    hidden = shard.rename(shard.with_suffix(".away"))
    assert shard.name in sentence("--quick")
    hidden.rename(shard)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert str(broken) in sentence("--quick", f"data.tokenizer={broken}")
    assert "holds no checkpoint" in sentence("--quick", f"checkpoint.initial_weights={tmp_path}")
    (tmp_path / "old" / "megatron_core-0.9.0.dist-info").mkdir(parents=True)
    (tmp_path / "old" / "megatron_core-0.9.0.dist-info" / "METADATA").write_text(
        "Name: megatron-core\nVersion: 0.9.0\n"
    )
    line = sentence("--quick", folder=tmp_path / "old")
    assert "megatron-core 0.9.0 is installed and megatron-core<0.20,>=0.16.1 is needed" in line
    for name, code, words in (
        ("disk", SLOW_DISK, "saves would take long; put run_dir on a faster file system"),
        ("clock", WRONG_CLOCK, "set the clock (chrony or ntpd)"),
    ):
        (tmp_path / name).mkdir()
        assert words in sentence(*([] if name == "disk" else ["--quick"]), own=code, folder=tmp_path / name)


def test_a_disk_without_room_for_the_checkpoints_has_its_sentence(tmp_path: Path) -> None:
    """NVLM-H 72B keeps four checkpoints of more than 100 GiB, of which a small file system has no room."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (it needs root)")
    try:
        run = write_run(tmp_path, run_dir=str(small / "run"))
        status, page = ask("--config", run)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert status == 2
    assert any("make room, or choose another run_dir" in line for line in bad_lines(page)), page


def test_what_the_driver_says_of_gpus_is_read() -> None:
    row = "NVIDIA H100 80GB HBM3, 580.1, {}, 1980, 1980, {}\n"
    (finding,) = read_gpus(row.format(0, 35) * 8)
    assert finding.verdict is Verdict.GOOD and "8 x NVIDIA H100 80GB HBM3, driver 580.1" in finding.sentence
    found = list(
        read_gpus(row.format(0, 35) + row.format(3, 35) + row.format("[N/A]", 95) + "NVIDIA A100, 580.1, 0, 1, 1, 30\n")
    )
    assert all(one.verdict is Verdict.BAD and one.of_node for one in found)
    said = " ".join(one.sentence for one in found)
    assert (
        "mixes NVIDIA A100, NVIDIA H100" in said
        and "GPU 1 has 3 uncorrected" in said
        and "GPU 2 has 95 degrees" in said
    )


def test_small_shared_memory_and_a_failing_check_of_the_cluster(tmp_path: Path) -> None:
    assert "no " in check_shared_memory(tmp_path / "absent").sentence
    assert run_command("true").verdict is Verdict.GOOD
    failed = run_command("echo link down; exit 3")
    assert failed.of_node and "ended with 3: link down" in failed.sentence
    assert "did not end within" in run_command("sleep 5", seconds=0.2).sentence


def test_the_slow_node_is_the_one_that_is_named() -> None:
    def rank(
        node: int, tflops: float = 600, inside: float = 300, between: tuple[float, ...] = (50, 50), clock: float = 0
    ) -> Measured:
        return Measured(f"n{node}", 0, tflops, inside, between, clock)

    def named(measured: list[Measured]) -> set[tuple[str, str]]:
        return {(node, one.subject) for node, one in compare(measured) if one.verdict is Verdict.BAD}

    sound = [rank(number) for number in range(6)]
    assert named(sound) == set()
    assert named([*sound, rank(6, tflops=300)]) == {("n6", "products")}
    assert named([*sound, rank(6, inside=30)]) == {("n6", "inside nodes")}
    assert named([*sound, rank(6, clock=60)]) == {("n6", "clock")}
    slow_link = [rank(0), rank(1, between=(50, 5)), rank(2, between=(5, 5)), rank(3, between=(5, 50)), rank(4)]
    assert named(slow_link) == {("n2", "between nodes")}


@pytest.mark.distributed
def test_ranks_are_compared_and_the_unfit_node_is_written_down(tmp_path: Path) -> None:
    write_samples(tmp_path / "shards", good_samples(24))
    run = write_run(tmp_path, tmp_path / "shards")
    (tmp_path / "sitecustomize.py").write_text(
        WRONG_CLOCK.replace("3600", "5000 if os.environ.get('AWRY') else right()")
    )
    variables = environment() | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}",
        "SLURMD_NODENAME": "n7",
    }
    for awry in (False, True):
        own = {**variables, "AWRY": "1"} if awry else variables
        line = command(DOCTOR, 2, "--config", str(run), "--job-start", "4711.0")
        done = subprocess.run(line, env=own, capture_output=True, text=True, timeout=200)
        found = {row.split()[1] for row in done.stdout.splitlines() if row.startswith("BAD ")}
        # What else runs on this machine may slow one of the two ranks.
        assert ("clock" in found) == awry and found <= {"clock", "products"}, done.stdout + done.stderr
        assert (done.returncode != 0) == bool(found)
        assert "1 nodes, 2 ranks: n7" in done.stdout and "TFLOP/s" in done.stdout
        page = json.loads(RunDir.named(tmp_path / "run").preflight.read_text())
        assert page["start"] == "4711.0" and page["unfit_nodes"] == (["n7"] if found else [])
    assert f"exitcode  : {UNFIT_NODES}" in done.stderr
