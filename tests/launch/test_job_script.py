"""What the job script makes of how a start ends: stand-ins for Slurm and torchrun on the path, real decisions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import REPOSITORY, environment

STAND_INS = {
    "scontrol": 'if [ "$1" = requeue ]; then echo "requeued $2"; elif [ "$1" = update ]; then echo "$@"; '
    'elif [ "$1" = show ] && [ "$2" = job ]; then echo "JobId=$4 ExcNodeList=n9 NodeList=n1"; else echo n1; fi',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
}
PYTHON = """
case $2 in
    *show_config) echo "$RUN_DIR" ;;
    *commands.doctor) exit "$DOCTOR_ALONE" ;;
    *launch_node)
        case $* in *commands.doctor*) echo "$DOCTOR_PAGE" >"$RUN_DIR/preflight.json"; exit "$DOCTOR_STATUS" ;; esac ;;&
    *launch_node) shift 4; START=$1; TORCHRUN ;;
    *) exec "REAL" "$@" ;;
esac
"""
REPORT = (
    'mkdir -p "$RUN_DIR/failures"; echo "{\\"start\\": \\"$SLURM_JOB_ID.0\\", \\"node\\": \\"n1\\", \\"failures\\": '
    '[{\\"rank\\": 3, \\"node\\": \\"n1\\", \\"exit_code\\": CODE, \\"time\\": 1.0, \\"message\\": \\"TOLD\\"}]}" '
    '>"$RUN_DIR/failures/n1.json"; exit 1'
)
MISTAKE = REPORT.replace("CODE", "2").replace("TOLD", "error: no such set")
# What the start does, exit code of the job, what the job says, whether it is queued again
CASES = {
    "finishes": ('echo 9 > "$RUN_DIR/finished"', 0, "the run is finished", False),
    "fails, finished before": ("exit 1", 0, "the start failed; the next one resumes from step 0", True),
    "a mistake": (MISTAKE, 2, "rank 3 on n1 (exit code 2): error: no such set", False),
    "stops": ('rm "$RUN_DIR/finished"; echo 5 > "$RUN_DIR/stopped"', 0, "back into the queue", True),
    "asked, finished before": ('rm "$RUN_DIR/finished"; kill -USR1 $PPID; sleep 1; exit 1', 0, "asked to stop", True),
    "asked, but a mistake": (f"kill -USR1 $PPID; sleep 1; {MISTAKE}", 2, "asked to stop", False),
}
FAILED_ON_N1 = {"ending": "failed", "first_step": 0, "last_step": 0, "failed_nodes": ["n1"], "exit_code": 1}


def run_job(
    folder: Path, torchrun: str, earlier: tuple[dict, ...] = (), options: tuple[str, ...] = (), **slurm: str
) -> subprocess.CompletedProcess[str]:
    """The script as Slurm runs it: a job 4711 on node n1, whose run had finished at step 4 before.

    Args:
        earlier: ends of starts of the same job.
    """
    python = PYTHON.replace("TORCHRUN", torchrun).replace("REAL", sys.executable)
    for name, body in {**STAND_INS, "python": python}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    run_dir = folder / "run"
    run_dir.mkdir()
    (run_dir / "finished").write_text("4\n")
    with (run_dir / "starts.jsonl").open("w") as history:
        for number, ended in enumerate(earlier):
            name = f"4711.-{number}"
            began = {"start": name, "job": "4711", "nodes": ["n1"], "first_step": 0, "marks": {}, "time": 0.0}
            history.write(json.dumps({"began": began}) + "\n" + json.dumps({"ended": {"start": name, **ended}}) + "\n")
    own = {
        **environment(),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_NNODES": "1",
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "RUN_DIR": str(run_dir),
        "CONTAINER": "none",
        "VIRTUAL_ENV": "",
        **slurm,
    }
    # A virtual environment of the repository would come before the stand-ins.
    tree = folder / "tree"
    (tree / "launch").mkdir(parents=True)
    for name in ("common.sh", "cluster.env", "pretrain_nvlm_h.sh"):
        (tree / "launch" / name).write_text((REPOSITORY / "launch" / name).read_text())
    own["SLURM_SUBMIT_DIR"] = str(tree)
    script = ["bash", str(tree / "launch" / "pretrain_nvlm_h.sh"), *options, "run.yaml"]
    return subprocess.run(script, env=own, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("case", CASES)
def test_how_a_start_ends_decides(case: str, tmp_path: Path) -> None:
    torchrun, status, said, queued = CASES[case]
    done = run_job(tmp_path, torchrun)
    assert (done.returncode, said in done.stdout + done.stderr) == (status, True), done.stdout + done.stderr
    assert ("requeued 4711" in done.stdout) == queued, done.stdout + done.stderr


def test_a_node_that_failed_twice_is_left_out(tmp_path: Path) -> None:
    torchrun = REPORT.replace("CODE", "-9").replace("TOLD", "")
    done = run_job(tmp_path, torchrun, ({**FAILED_ON_N1, "last_step": 1},))
    assert done.returncode == 0, done.stderr
    assert "rank 3 on n1 (killed by SIGKILL)" in done.stderr
    assert "requeued 4711" in done.stdout and "update JobId=4711 ExcNodeList=n9,n1" in done.stdout
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["rank"] == 3


def test_a_job_that_got_an_excluded_node_goes_back_without_a_start(tmp_path: Path) -> None:
    done = run_job(tmp_path, "echo started", (FAILED_ON_N1, FAILED_ON_N1))
    assert done.returncode == 0 and "started" not in done.stdout
    assert "update JobId=4711 ExcNodeList=n9,n1" in done.stdout


def test_no_progress_ends_the_job_with_its_code(tmp_path: Path) -> None:
    elsewhere = {**FAILED_ON_N1, "failed_nodes": []}
    done = run_job(tmp_path, "exit 1", (elsewhere,))
    assert done.returncode == 10 and "requeued" not in done.stdout
    assert "2 starts in a row saved nothing after step 0" in done.stderr


def test_a_chain_goes_on_by_its_next_job_and_not_after_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "stops").mkdir(), (tmp_path / "mistake").mkdir()
    array = {"SLURM_JOB_ID": "4712", "SLURM_ARRAY_JOB_ID": "4711"}
    stops = run_job(tmp_path / "stops", 'echo 5 > "$RUN_DIR/stopped"', **array)
    assert stops.returncode == 0 and "the next job of the chain goes on" in stops.stdout
    assert "requeued" not in stops.stdout
    mistake = {**FAILED_ON_N1, "ending": "deterministic", "failed_nodes": [], "exit_code": 2}
    after = run_job(tmp_path / "mistake", "echo started", (mistake,), **array)
    assert after.returncode == 2 and "started" not in after.stdout


@pytest.mark.parametrize(
    ("alone", "status", "page", "code", "said"),
    [
        (0, 0, "{}", 0, "the run is finished"),
        (2, 0, "{}", 2, "the same start would fail again"),
        (0, 143, '{"start": "4711.0", "unfit_nodes": ["n1"]}', 0, "requeued 4711"),
        (0, 143, '{"start": "4711.0", "unfit_nodes": ["n1"]}', 0, "update JobId=4711 ExcNodeList=n9,n1"),
        (0, 1, "{}", 0, "the start failed; the next one resumes from step 0"),
    ],
)
def test_preflight_decides_whether_training_starts(
    alone: int, status: int, page: str, code: int, said: str, tmp_path: Path
) -> None:
    doctor = {"DOCTOR_ALONE": str(alone), "DOCTOR_STATUS": str(status), "DOCTOR_PAGE": page}
    training = 'echo started; echo 9 > "$RUN_DIR/finished"'
    done = run_job(tmp_path, training, options=("--preflight",), **doctor)
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr
    assert ("started" in done.stdout) == (alone == status == 0)
