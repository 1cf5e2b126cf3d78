"""A run that hangs ends: the watchdog says who stopped where, and no process stays behind.

Every rank beats at each micro-batch. A thread of each rank tells the others, through the store that brought the ranks
together, what it last did; a rank that sees no beat of its own for longer than the limit of what it does (a step, the start,
a save) names the rank that was silent longest or is furthest behind, and exits. The launcher (torchrun, Slurm) then ends the
others, also a rank that no longer runs. Collectives have a longer timeout (parallel/groups.py), so that this sentence comes
first. The thread of rank 0 also writes RUN_DIR/heartbeat.json.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

from megatron_nvlm.exit_codes import WATCHDOG
from megatron_nvlm.runs.failures import node_name, tell_launcher
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.whole_files import write_whole_text

_QUESTION_SECONDS = 5
"""Seconds that the last question to the store may take: the rank that holds the store may be the one that hangs."""
_HEARTBEAT_SECONDS = 5
"""Between two writes of heartbeat.json."""
STEP, START, SAVE = "timeout_seconds", "start_timeout_seconds", "save_timeout_seconds"
"""Keys of section `training` whose values are the limits."""


@dataclass(frozen=True)
class Beat:
    """What a rank did last."""

    step: int
    stage: int
    action: str
    keys: tuple[str, ...]
    count: int
    """Beats so far."""
    time: float
    """Of the clock on the wall, in seconds; the thread renews it while the process lives."""

    def describe(self) -> str:
        """Within a sentence."""
        samples = f", samples {', '.join(self.keys)}" if self.keys else ""
        return f"step {self.step}, pipeline stage {self.stage}, {self.action}{samples}"


class Watchdog:
    """Watches this rank while its `with` block lasts.

    Args:
        limits: longest seconds without a beat, by key.
    """

    def __init__(self, limits: Mapping[str, float], run_dir: RunDir) -> None:
        self.limits = limits
        self._run_dir = run_dir
        self._limit = START
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._stage = parallel_state.get_pipeline_model_parallel_rank() + 1
        self._count = 0
        self._beaten = time.monotonic()
        self._beat = Beat(0, self._stage, "starting", (), 0, time.time())
        self._ended = threading.Event()
        self._store, self._asked = _own_connection(), _own_connection()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=_QUESTION_SECONDS)

    def beat(self, step: int, action: str, keys: tuple[str, ...] = (), limit: str = STEP) -> None:
        """Say that this rank goes on. Cheap: it talks to nobody.

        Args:
            keys: samples that it now works on; by default those of before.
            limit: key of the time that may pass until the next beat.
        """
        self._limit = limit
        self._count += 1
        self._beat = Beat(step, self._stage, action, keys or self._beat.keys, self._count, time.time())
        self._beaten = time.monotonic()

    def _watch(self) -> None:
        # Once a second, or less often where the store serves very many.
        shortest = min(self.limits.values())
        tell_every = min(max(1.0, self.ranks / 256), shortest / 4)
        self._tell()
        told, written = time.monotonic(), float(-_HEARTBEAT_SECONDS)
        while not self._ended.wait(min(0.5, shortest / 10)):
            now = time.monotonic()
            if now - told >= tell_every:
                self._tell()
                told = now
            # Not before the first beat: a start that fails leaves the run as it was.
            if self._beat.count and now - written >= _HEARTBEAT_SECONDS:
                self._write_heartbeat()
                written = now
            # Read before the time of the last beat: a beat in between is a later one.
            limit = self._limit
            if now - self._beaten >= self.limits[limit]:
                self._end(limit)

    def _write_heartbeat(self) -> None:
        if self.rank:
            return
        beat = {"time": time.time(), "step": self._beat.step, "action": self._beat.action, "ranks": self.ranks}
        start = {"node": node_name(), "process": os.getpid(), "start": os.environ.get("TORCHELASTIC_RUN_ID")}
        with suppress(OSError):  # a full disk is said by who loses something by it
            write_whole_text(self._run_dir.heartbeat, json.dumps({**beat, **start}) + "\n")

    def _tell(self) -> None:
        alive = Beat(**{**asdict(self._beat), "time": time.time()})
        try:
            self._store.set(str(self.rank), json.dumps(asdict(alive)))
        except (RuntimeError, ValueError):  # the store is gone; this rank's own timeout still holds
            return

    def _end(self, limit: str) -> None:
        answer: list[str] = []
        question = threading.Thread(target=lambda: answer.append(self._whom(self.limits[limit])), daemon=True)
        question.start()
        question.join(_QUESTION_SECONDS)
        who = answer[0] if answer else "the other ranks could not be asked, since their store does not answer"
        message = (
            f"error: rank {self.rank} ({self._beat.describe()}) has waited for {self.limits[limit]:g} s, "
            f"training.{limit}; {who}; every rank ends, and the same command goes on from the last checkpoint"
        )
        print(message, file=sys.stderr, flush=True)
        tell_launcher(message)
        os._exit(WATCHDOG)

    def _whom(self, limit_seconds: float) -> str:
        """The rank that was silent longest or, if all still run, the one that is furthest behind."""
        beats = {}
        for rank in range(self.ranks):
            if self._asked.check([str(rank)]):
                content = json.loads(self._asked.get(str(rank)))
                beats[rank] = Beat(**{**content, "keys": tuple(content["keys"])})
        unheard = [rank for rank in range(self.ranks) if rank not in beats]
        if unheard:
            return f"rank {unheard[0]} was never heard of"
        now = time.time()
        silent = max(beats, key=lambda rank: now - beats[rank].time)
        silence = now - beats[silent].time
        if silent != self.rank and silence > limit_seconds / 2:
            return f"rank {silent} was last heard of {silence:.0f} s ago ({beats[silent].describe()})"
        behind = min(beats, key=lambda rank: (beats[rank].step, beats[rank].count))
        return f"all ranks still run and rank {behind} is furthest behind ({beats[behind].describe()})"


def _own_connection() -> distributed_c10d.PrefixStore:
    """The store that brought the ranks together, by a connection of its own.

    A connection serves one request at a time: a thread that waits for a key (a group that is being made) would keep a
    living rank silent, and a word to a store that does not answer would keep the question after it waiting.
    """
    store = distributed_c10d._get_default_store()
    clone = getattr(store, "clone", None)  # PyTorch 2.6 and 2.7 have none
    return distributed_c10d.PrefixStore("watchdog", store if clone is None else clone())
