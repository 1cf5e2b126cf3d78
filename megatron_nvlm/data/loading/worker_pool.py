"""Worker processes and what is under way in them. Results do not depend on how many there are, or on who is fast.

One thread of the parent hands tasks out in order, at most a few per worker, and takes answers in. A worker that dies ends
the run with one sentence.
"""

import os
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait

from megatron_nvlm.data.loading.fetch import BadRecord, SampleRequest
from megatron_nvlm.data.loading.tile_memory import Ring, TileMemory
from megatron_nvlm.data.loading.worker_tasks import Done, Failed, Task, WorkerSetup
from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.data.shards.remote import CacheConfig
from megatron_nvlm.errors import UserError

_TASKS_OF_A_WORKER = 3
"""Handed out ahead, so that a worker never waits for its next."""


@dataclass
class Ticket:
    """A sample that was asked for."""

    request: SampleRequest
    room: int
    """Tiles to keep room for; more come back another way."""
    offset: int | None = None
    done: Done | None = None
    unwanted: bool = False


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    under_way: int = 0


@dataclass
class _Shared:
    """What the thread and the loader both touch, under one lock."""

    lock: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[int] = field(default_factory=deque)
    tickets: dict[int, Ticket] = field(default_factory=dict)
    failure: Failed | None = None
    closing: bool = False


class WorkerPool:
    """Starts workers and prepares samples in them.

    Args:
        memory_bytes: of the shared memory for tiles.
    """

    works_ahead = True

    def __init__(
        self,
        sets: Sequence[ShardSet],
        pipeline: SamplePipeline,
        num_workers: int,
        memory_bytes: int,
        with_pixels: bool = True,
        cache: CacheConfig | None = None,
    ) -> None:
        self.tile_size = pipeline.tiling.tile_size
        self._tile_bytes = 3 * self.tile_size * self.tile_size
        self._memory = TileMemory(memory_bytes)
        self._ring = Ring(self._memory.size)
        self._shared = _Shared()
        self._next = 0
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        setup = WorkerSetup(tuple(shards.location for shards in sets), cache or CacheConfig(), pipeline, with_pixels)
        self._workers = [_start_worker(self._memory, setup) for _ in range(num_workers)]
        self._thread = threading.Thread(target=self._serve, name="loader", daemon=True)
        self._thread.start()
        self.close = weakref.finalize(self, _stop, self._shared, self._wake, self._workers)

    @property
    def process_ids(self) -> list[int]:
        """Of the workers."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, request: SampleRequest, room: int) -> int:
        """Ask for a sample; its number is for `collect` or `forget`. Ask in the order of use.

        Args:
            room: tiles to keep room for in the shared memory; more come through the pipe.
        """
        number, self._next = self._next, self._next + 1
        with self._shared.lock:
            self._shared.tickets[number] = Ticket(request, room)
            self._shared.waiting.append(number)
        self._ring_bell()
        return number

    @property
    def most_tiles(self) -> int:
        """Tiles that may be held at once."""
        return self._memory.size // self._tile_bytes // 2

    def collect(self, number: int) -> PreparedSample | BadRecord:
        """Wait for a sample. Its tiles lie in the shared memory: copy them, then `release` it.

        Raises:
            UserError: a worker died, or met what ends the run.
        """
        shared = self._shared
        with shared.lock:
            ticket = shared.tickets[number]
            while ticket.done is None and shared.failure is None:
                shared.lock.wait()
            if ticket.done is None:
                assert shared.failure is not None
                if shared.failure.is_users:
                    raise UserError(shared.failure.message)
                raise RuntimeError(f"a loader worker failed:\n{shared.failure.message}")
        done = ticket.done
        if isinstance(done.result, BadRecord) or not done.in_memory:
            return done.result
        assert ticket.offset is not None
        return replace(done.result, tiles=self._memory.view(ticket.offset, done.num_tiles, self.tile_size))

    def release(self, number: int) -> None:
        """Give back a collected sample's memory."""
        with self._shared.lock:
            self._free(self._shared.tickets.pop(number))
        self._ring_bell()

    def forget(self, numbers: Sequence[int]) -> None:
        """Samples that are not wanted any more, under way or not."""
        shared = self._shared
        with shared.lock:
            for number in numbers:
                ticket = shared.tickets[number]
                ticket.unwanted = True
                if number in shared.waiting:
                    shared.waiting.remove(number)
                    del shared.tickets[number]
                elif ticket.done is not None:
                    self._free(shared.tickets.pop(number))
        self._ring_bell()

    def _free(self, ticket: Ticket) -> None:
        if ticket.offset is not None:
            self._ring.free(ticket.offset)
            ticket.offset = None

    def _ring_bell(self) -> None:
        try:
            os.write(self._wake, b"x")
        except BlockingIOError:  # enough bells are waiting to be heard
            return

    def _serve(self) -> None:
        """The thread: hand out, wait, take in."""
        workers = {worker.connection: worker for worker in self._workers}
        while True:
            try:
                self._hand_out()
                for ready in wait([self._woken, *workers]):
                    if isinstance(ready, int):
                        os.read(self._woken, 4096)
                    elif isinstance(ready, Connection):
                        self._take_in(workers[ready])
            except (EOFError, OSError):
                if not self._shared.closing:
                    self._fail(Failed(self._describe_death(), True))
            except Exception:  # without this thread the loader would wait forever
                self._fail(Failed(traceback.format_exc(), False))
            with self._shared.lock:
                if self._shared.closing or self._shared.failure is not None:
                    return

    def _hand_out(self) -> None:
        while True:
            worker = min(self._workers, key=lambda worker: worker.under_way)
            with self._shared.lock:
                if worker.under_way >= _TASKS_OF_A_WORKER or not self._shared.waiting:
                    return
                number = self._shared.waiting[0]
                ticket = self._shared.tickets[number]
                size = ticket.room * self._tile_bytes
                fits = 0 < size <= self._ring.size
                if fits:
                    ticket.offset = self._ring.take(size)
                    if ticket.offset is None:
                        return  # room comes with the next release
                self._shared.waiting.popleft()
                worker.under_way += 1
                room = ticket.room if fits else 0
                task = Task(number, ticket.request, ticket.offset or 0, room)
            worker.connection.send(task)

    def _take_in(self, worker: _Worker) -> None:
        answer = worker.connection.recv()
        if isinstance(answer, Failed):
            self._fail(answer)
            return
        with self._shared.lock:
            worker.under_way -= 1
            ticket = self._shared.tickets[answer.number]
            if ticket.unwanted:
                self._free(self._shared.tickets.pop(answer.number))
            ticket.done = answer
            self._shared.lock.notify_all()

    def _fail(self, failure: Failed) -> None:
        with self._shared.lock:
            self._shared.failure = self._shared.failure or failure
            self._shared.lock.notify_all()

    def _describe_death(self) -> str:
        for worker in self._workers:
            try:
                code = worker.process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                continue
            how = f"killed by signal {-code}" if code < 0 else f"ended with status {code}"
            return (
                f"the loader worker {worker.process.pid} was {how} (9 is mostly the kernel, for want of memory: lower "
                "data.num_workers or data.prefetch_samples); start again: the run goes on from its last checkpoint"
            )
        return "a loader worker closed its connection; start again: the run goes on from its last checkpoint"


def _start_worker(memory: TileMemory, setup: WorkerSetup) -> _Worker:
    ours, theirs = socket.socketpair()
    arguments = [str(theirs.fileno()), str(memory.descriptor)]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_nvlm.data.loading.worker", *arguments],
        pass_fds=(theirs.fileno(), memory.descriptor),
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
    )
    theirs.close()
    connection = Connection(ours.detach())
    connection.send(setup)
    return _Worker(process, connection)


def _stop(shared: _Shared, wake: int, workers: list[_Worker]) -> None:
    """End thread and workers; a worker in the middle of a sample ends with it."""
    with shared.lock:
        if shared.closing:
            return
        shared.closing = True
    os.write(wake, b"x")
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.wait()
        worker.connection.close()
