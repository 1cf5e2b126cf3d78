"""Training's side of trackers: starts the process that sends, and tells it when training is done."""

import os
import subprocess
import sys
from contextlib import suppress

from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.trackers.config import MlflowConfig, WandbConfig
from megatron_nvlm.trackers.sender import END_SECONDS, WORD

_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


class TrackerProcess:
    """The process that sends the metrics of this run; rank 0 has one, where a tracker is named."""

    def __init__(self, run_dir: RunDir, train_steps: int) -> None:
        outside = (*_OF_RANKS, "TORCHELASTIC_ERROR_FILE")
        environment = {name: value for name, value in os.environ.items() if name not in outside}
        command = [sys.executable, "-m", "megatron_nvlm.trackers.sender", str(run_dir)]
        command += ["--train-steps", str(train_steps), "--parent", str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
        self._run_dir = run_dir

    def close(self) -> None:
        """Say that training is done, and wait until everything was sent, but not for long."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended
            self._process.stdin.write(WORD)
            self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            print(
                f"trackers did not take all metrics within {END_SECONDS} s; `python -m tools.send_metrics "
                f"{self._run_dir}` sends the rest, and so does the next start",
                file=sys.stderr,
                flush=True,
            )


def start_trackers(
    run_dir: RunDir, train_steps: int, wandb: WandbConfig, mlflow: MlflowConfig
) -> TrackerProcess | None:
    """The process that sends; None where no tracker is named."""
    return TrackerProcess(run_dir, train_steps) if wandb.project is not None or mlflow.uri is not None else None
