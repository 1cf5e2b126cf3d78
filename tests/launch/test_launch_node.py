"""A node's part of a job, where the nodes do not meet, and where no report can be written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nvlm.exit_codes import USER_ERROR
from megatron_nvlm.runs.failures import read_reports
from megatron_nvlm.runs.run_dir import RunDir
from tests.support.launch import REPOSITORY, environment
from tests.support.ranks import free_port

ALONE = {
    "nobody else comes": ["--rdzv-conf=is_host=true,join_timeout=2"],
    "the first node is not there": ["--rdzv-conf=is_host=false,read_timeout=2"],
}


@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE)
def test_nodes_that_do_not_meet_end_in_one_sentence(options: list[str], tmp_path: Path) -> None:
    endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    launch = ["megatron_nvlm.commands.launch_node", str(tmp_path), "7.0", "--nnodes=2", "--rdzv-backend=c10d", endpoint]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "--rdzv-id=7.0", *options, "-m", "megatron_nvlm.train", "--config", "demo_h"],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert len(said) == 1 and "did not meet the other nodes (Rendezvous" in said[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "a node that did not start leaves no word"


@pytest.mark.parametrize("is_partial", [True, False], ids=["a save that was begun", "other files"])
def test_a_full_disk_does_not_hide_the_failure(is_partial: bool, tmp_path: Path) -> None:
    """Saves that were not completed make room for the report; other files cannot, and the exit code stands."""
    if os.geteuid() != 0:
        pytest.skip("a file system of its own needs root")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(run_dir)], check=True)
    try:
        kept = run_dir / "checkpoints" / "step_00000002"
        filled = run_dir / "checkpoints" / ".step_00000004.partial" if is_partial else kept
        kept.mkdir(parents=True)
        filled.mkdir(exist_ok=True)
        (run_dir / "failures").mkdir()
        with (filled / "weights").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(run_dir).free)
        launch = ["megatron_nvlm.commands.launch_node", str(run_dir), "7.0", "--standalone"]
        done = subprocess.run(
            [sys.executable, "-m", *launch, "-m", "megatron_nvlm.train", "--config", "no_such_run"],
            cwd=REPOSITORY,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == USER_ERROR, done.stderr
        reports = [report for report in read_reports(RunDir(run_dir), "7.0") if report.failures]
        assert len(reports) == is_partial and kept.exists()
        assert ("could not be written ([Errno 28]" in done.stderr) != is_partial, done.stderr
    finally:
        subprocess.run(["umount", "--lazy", str(run_dir)], check=True)
