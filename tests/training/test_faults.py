"""A run directory has one run at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nvlm.errors import UserError
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.training import faults
from tests.support.launch import environment

HOLD = "import sys; from megatron_nvlm.runs.run_dir import RunDir; "
HOLD += "from megatron_nvlm.training.faults import lock_run; from pathlib import Path; "
HOLD += "lock = lock_run(RunDir(Path(sys.argv[1]))); print('held', flush=True); sys.stdin.read()"


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "LOCK_PATIENCE_SECONDS", 0)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"another run works in .* \(process {first.pid} on "):
            faults.lock_run(RunDir(tmp_path))
        first.kill()
    faults.lock_run(RunDir(tmp_path)).close()
