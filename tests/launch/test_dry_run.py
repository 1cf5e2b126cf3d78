"""The six job scripts say what they would run, and refuse mistakes, without Slurm."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import REPOSITORY, environment

SCRIPTS = [f"{recipe}_nvlm_{variant}" for recipe in ("pretrain", "sft") for variant in "dxh"]


APPTAINER = """#!/bin/bash
while [ "$1" != image.sif ]; do shift; done
shift
exec "$@"
"""
"""Stands in for Apptainer: runs the command here."""


def dry_run(script: str, *arguments: str, **own: str) -> subprocess.CompletedProcess[str]:
    """`own`: settings of the cluster."""
    inherited = {name: value for name, value in environment().items() if not name.startswith(("SLURM_", "NPROC_"))}
    command = ["bash", f"launch/{script}.sh", *arguments]
    return subprocess.run(
        command, env={**inherited, **own}, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("size", ["72b", "34b"])
def test_scripts_are_ready_for_16_nodes(script: str, size: str) -> None:
    run_file = f"configs/{script}_{size}.yaml"
    done = dry_run(script, "--dry-run", *([run_file] if size != "72b" else []))
    assert done.returncode == 0, done.stderr
    assert f"16 nodes x 8 processes = 128 ranks, run directory runs/{script}_{size}" in done.stdout
    assert "node 15: ranks 120 to 127" in done.stdout
    assert "'--nnodes=16' '--nproc-per-node=8'" in done.stdout and f"'--config' '{run_file}'" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dryrun",), "unknown option --dryrun"),
        (("--dry-run", "configs/none.yaml"), "none.yaml"),
        (("--dry-run", "optimizer.max_lrr=1"), "did you mean optimizer.max_lr?"),
        (("--dry-run", "parallelism.tensor=3"), "error: "),
        ((), "submit it with sbatch"),
    ],
)
def test_a_mistake_ends_with_one_sentence(arguments: tuple[str, ...], said: str) -> None:
    done = dry_run("pretrain_nvlm_h", *arguments)
    assert done.returncode == 2 and not done.stdout
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_commands_run_in_the_container(tmp_path: Path) -> None:
    (tmp_path / "apptainer").write_text(APPTAINER)
    (tmp_path / "apptainer").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{environment()['PATH']}"}
    done = dry_run("pretrain_nvlm_h", "--dry-run", CONTAINER="apptainer", CONTAINER_IMAGE="image.sif", **path)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    assert command.startswith("'srun' ") and "'apptainer' 'exec' '--nv'" in command
    assert "'image.sif' 'python' '-m' 'megatron_nvlm.commands.launch_node'" in command

    own = {"CONTAINER": "pyxis", "CONTAINER_IMAGE": "registry#nvlm:1", "CONTAINER_MOUNTS": "/data:/data"}
    command = dry_run("pretrain_nvlm_h", "--dry-run", **own, **path).stdout.splitlines()[-1]
    assert "'--container-image=registry#nvlm:1'" in command and ",/data:/data'" in command

    refused = dry_run("pretrain_nvlm_h", "--dry-run", CONTAINER="docker", CONTAINER_IMAGE="x")
    assert refused.returncode == 2 and "CONTAINER is docker; it must be none, pyxis or apptainer" in refused.stderr
