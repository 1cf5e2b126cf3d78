"""A node's part of a job where no batch script runs: Kubernetes, SkyPilot. What launch/common.sh does under Slurm.

`... launch_pod --job NAME --nnodes 16 --nproc-per-node 8 RUN_FILE [section.key=value ...]`, on every node alike. The node
with index 0 keeps the history of starts (commands/job_start.py). SIGTERM, which a pod gets before it is removed, saves and
stops the run on all nodes. The exit code says whether the controller may start the job again: launch/README.md.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.config.load import load_run
from megatron_nvlm.errors import UserError
from megatron_nvlm.exit_codes import DETERMINISTIC, ENDED_WELL, START_AGAIN
from megatron_nvlm.runs.entry import user_errors_end_the_process
from megatron_nvlm.runs.failures import read_reports
from megatron_nvlm.runs.resolve import resolve_run
from megatron_nvlm.runs.restart_policy import Decision, decide
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.runs.start_history import starts_of

PATIENCE_SECONDS = 30.0
"""For files that other nodes write when a start ends: reports of failures, the marks of the end."""
_INDEX_NAMES = ("PET_NODE_RANK", "SKYPILOT_NODE_RANK")
"""Names under which Kubeflow's controllers and SkyPilot tell a node its index."""


@dataclass(frozen=True)
class Pod:
    """One node of a job, and what it runs."""

    job: str
    """Names all starts of the job together."""
    index: int
    nnodes: int
    nproc_per_node: int
    endpoint: str
    """HOST:PORT of the node with index 0."""
    max_failures: int
    max_restarts: int
    training: tuple[str, ...]
    """Run file and overrides."""

    @property
    def is_first(self) -> bool:
        """Whether this node keeps the history and holds the rendezvous."""
        return self.index == 0

    def torchrun_arguments(self) -> list[str]:
        """Those of launch/common.sh, and what a node without a resolvable name needs."""
        own_address = os.environ.get("POD_IP")
        return [
            f"--nnodes={self.nnodes}",
            f"--nproc-per-node={self.nproc_per_node}",
            f"--max-restarts={self.max_restarts}",
            f"--rdzv-id={self.job}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.endpoint}",
            f"--rdzv-conf=is_host={'true' if self.is_first else 'false'}",
            *([f"--local-addr={own_address}"] if own_address else []),
            *("-m", "megatron_nvlm.train", "--config"),
            *self.training,
        ]


class _Asked:
    """Passes a request to stop on to all nodes, by the file that every rank looks for."""

    def __init__(self, run_dir: RunDir) -> None:
        self.asked = False
        self._run_dir = run_dir
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        print("asked to stop: saving at the end of the step", flush=True)
        self.touch()

    def touch(self) -> None:
        """Leave the request, also where the run has no directory yet."""
        self._run_dir.path.mkdir(parents=True, exist_ok=True)
        self._run_dir.stop.touch()


def launch(pod: Pod, run_dir: RunDir) -> int:
    """Run a start on this node and return the exit code for the controller."""
    request = _Asked(run_dir)
    if pod.is_first:
        action, code = _ask_job_start("before", pod, run_dir)
        if action != "run":
            return _for_controller(action, code)
    elif (decision := _last_decision(pod, run_dir)) is not None and not decision.requeue:
        print(decision.reason, flush=True)
        return decision.exit_code
    if request.asked:
        request.touch()  # `before` removes the requests that earlier starts left
    print(f"node {pod.index} of {pod.nnodes}, {pod.nproc_per_node} processes, {run_dir}", flush=True)
    node = [sys.executable, "-m", "megatron_nvlm.commands.launch_node", str(run_dir), pod.job]
    status = subprocess.Popen([*node, *pod.torchrun_arguments()], start_new_session=True).wait()
    if not pod.is_first:
        return _own_code(status, run_dir)
    if status != 0:
        _wait_for(lambda: len(read_reports(run_dir, pod.job)) >= pod.nnodes)
    asked = ["--asked"] if request.asked else []
    return _for_controller(*_ask_job_start("after", pod, run_dir, f"--status={status}", *asked))


def _ask_job_start(when: str, pod: Pod, run_dir: RunDir, *more: str) -> tuple[str, int]:
    """The answer of commands/job_start.py: action and exit code.

    Raises:
        UserError: the history could not be kept.
    """
    question = [sys.executable, "-m", "megatron_nvlm.commands.job_start", when, str(run_dir)]
    options = ["--start", pod.job, "--job", pod.job, "--max-failures", str(pod.max_failures)]
    done = subprocess.run([*question, *options, *more], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the history of starts in {run_dir} could not be kept; make it writable, then start again")
    action, code, excluded = done.stdout.split()[-3:]
    if excluded != "-":
        print(f"take these nodes out yourself (kubectl cordon): {excluded}", file=sys.stderr, flush=True)
    return action, int(code)


def _last_decision(pod: Pod, run_dir: RunDir) -> Decision | None:
    """What the first node decided after the last start, which it would not tell others by the rendezvous."""
    starts, unfinished = starts_of(run_dir, pod.job)
    return decide(starts, pod.max_failures) if starts and unfinished is None else None


def _for_controller(action: str, code: int) -> int:
    return START_AGAIN if action == "requeue" else code


def _own_code(status: int, run_dir: RunDir) -> int:
    """Of a node that keeps no history, from its own processes alone."""
    if status in DETERMINISTIC:
        return status
    if status != 0:
        return START_AGAIN
    _wait_for(lambda: run_dir.finished.exists() or run_dir.stopped.exists())
    return ENDED_WELL if run_dir.finished.exists() else START_AGAIN


def _wait_for(reached: Callable[[], bool]) -> None:
    """Give up after `PATIENCE_SECONDS`: a lost node writes nothing."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.2)


def _told(names: Sequence[str], default: str) -> str:
    return next((os.environ[name] for name in names if os.environ.get(name)), default)


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Run one node's part of a job, with its history of starts.")
    parser.add_argument("--job", required=True, help="name of the job; all its starts share it")
    parser.add_argument("--nnodes", type=int, required=True)
    parser.add_argument("--nproc-per-node", type=int, required=True)
    parser.add_argument("--node-index", type=int, help=f"from 0; by default ${', $'.join(_INDEX_NAMES)}")
    parser.add_argument("--endpoint", help="HOST:PORT of node 0; by default $PET_MASTER_ADDR:$PET_MASTER_PORT")
    parser.add_argument("--max-failures", type=int, default=10, help="failed starts after which it still starts again")
    parser.add_argument("--max-restarts", type=int, default=0, help="torchrun's, within one start")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    index, endpoint = options.node_index, options.endpoint
    pod = Pod(
        options.job,
        int(_told(_INDEX_NAMES, "0")) if index is None else index,
        options.nnodes,
        options.nproc_per_node,
        endpoint or f"{_told(['PET_MASTER_ADDR'], 'localhost')}:{_told(['PET_MASTER_PORT'], '29500')}",
        options.max_failures,
        options.max_restarts,
        (options.config, *options.overrides),
    )
    run = resolve_run(load_run(options.config, options.overrides), pod.nnodes * pod.nproc_per_node)
    raise SystemExit(launch(pod, run.run_dir))


if __name__ == "__main__":
    sys.exit(main())
