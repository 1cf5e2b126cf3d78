"""A node's part of a job, where the nodes do not meet."""

import subprocess
import sys
from pathlib import Path

import pytest

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
