"""Kernels compiled for GPUs that are not there: nothing spills, shared memory suffices, tensor cores are used."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize(("capability", "unit"), [(80, "mma.sync"), (90, "wgmma")])
def test_interval_attention_fits(capability: int, unit: str) -> None:
    command = [sys.executable, "-m", "tests.support.compile_interval", str(capability)]
    made = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    kernels = json.loads(made.stdout)
    assert len(kernels) == 6
    assert [kernel for kernel in kernels if not kernel["fits"]] == []
    assert {kernel["tensor_cores"] for kernel in kernels} == {unit}
