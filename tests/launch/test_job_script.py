"""What the job script makes of the markers that a start leaves, with stand-ins for Slurm and torchrun on the path."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.launch import REPOSITORY

STAND_INS = {
    "scontrol": 'if [ "$1" = requeue ]; then echo "requeued $2"; else echo localhost; fi',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "python": 'echo "$RUN_DIR"',
}
CASES = {
    "finishes": ('echo 9 > "$RUN_DIR/finished"', 0, "the run is finished after step 9"),
    "fails, finished before": ("exit 1", 1, "the run failed (status 1)"),
    "stops": ('rm "$RUN_DIR/finished"; echo 5 > "$RUN_DIR/stopped"', 0, "requeued 4711"),
    "asked, finished before": ('rm "$RUN_DIR/finished"; kill -USR1 $PPID; sleep 1; exit 1', 0, "requeued 4711"),
}


@pytest.mark.parametrize("case", CASES)
def test_markers_count_only_if_the_start_ended_well(case: str, tmp_path: Path) -> None:
    torchrun, status, said = CASES[case]
    for name, body in {**STAND_INS, "torchrun": torchrun}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "env.sh").write_text("")
    (tmp_path / "launch" / "common.sh").write_text((REPOSITORY / "launch" / "common.sh").read_text())
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "finished").write_text("4\n")
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1"}
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "RUN_DIR": str(run_dir)}
    script = REPOSITORY / "launch" / "pretrain_nvlm_h.sh"
    done = subprocess.run(
        ["bash", str(script), "run.yaml"],
        env={**os.environ, **slurm, **own},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, said in done.stdout + done.stderr) == (status, True), done.stdout + done.stderr
    assert ("requeued" in done.stdout) == ("requeued" in said)
