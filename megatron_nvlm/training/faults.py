"""Being asked to stop: a signal to any rank, or a file `stop` in the run directory; all ranks stop after the same step.

A rank whose launcher has died is asked too, and a run directory has one run at a time: after `kill -9` of the launcher,
the same command waits for the ranks it left behind and goes on from what they saved.
"""

import ctypes
import fcntl
import os
import signal
import time
from types import FrameType
from typing import TextIO

import torch
import torch.distributed as dist

from megatron_nvlm.core_compat import PR_SET_PDEATHSIG
from megatron_nvlm.errors import UserError
from megatron_nvlm.runs.run_dir import RunDir

LOCK_PATIENCE_SECONDS = 90
"""For ranks of an interrupted run to save and end."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Listens from creation on; `agree` shares what any rank has heard, so that all stop after the same step."""

    def __init__(self, run_dir: RunDir) -> None:
        self._stop_file = run_dir.stop
        self._signalled = False
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    @property
    def asked(self) -> bool:
        """Whether this rank has seen a signal or the file."""
        return self._signalled or self._stop_file.exists()

    def agree(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; one collective that every rank joins."""
        asked = torch.tensor(float(self.asked), device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


def stop_with_launcher() -> None:
    """Have this process get SIGTERM when the process that started it ends (Linux; elsewhere nothing happens)."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        return


def lock_run(run_dir: RunDir) -> TextIO:
    """Hold the run directory for this process; the lock goes when the returned file is closed or the process ends.

    Raises:
        UserError: another run holds it, and still does after `LOCK_PATIENCE_SECONDS`.
    """
    run_dir.path.mkdir(parents=True, exist_ok=True)
    file = run_dir.lock.open("a+")
    began, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
        except OSError as error:  # some network file systems have no locks
            print(f"{run_dir.path} cannot be locked ({error}); see to it that no other run works in it", flush=True)
            return file
        if time.monotonic() - began > LOCK_PATIENCE_SECONDS:
            raise UserError(
                f"another run works in {run_dir.path} (process {holder}); stop it (touch {run_dir.stop}) or choose "
                "another run_dir"
            )
        if not told:
            print(f"waiting for process {holder}, which still works in {run_dir.path}", flush=True)
            told = True
        time.sleep(0.5)
    file.truncate(0)
    file.write(f"{os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file
