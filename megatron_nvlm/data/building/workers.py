"""Processes that build blocks, and that stop within a moment when the build is given up."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def first_interrupt_only() -> Iterator[None]:
    """Within it, the first Ctrl-C raises KeyboardInterrupt and later ones are passed over: stopping takes a moment."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGINT) is interrupt:  # else the process is about to end
                signal.signal(signal.SIGINT, before)
    else:
        yield


BuildBlock = Callable[[int, Callable[[], None]], None]
"""(block, what to call after each sample)."""
_SECONDS_BETWEEN_LOOKS = 0.1


class Workers:
    """A pool of processes. Left by an error or an interrupt, it ends them in the middle of their blocks.

    Blocks are all or nothing, so nothing half done is ever taken for done.
    """

    def __init__(self, build_block: BuildBlock, num_processes: int, num_done: int) -> None:
        context = multiprocessing.get_context("fork")
        self._num_done = context.Value("q", num_done)
        # Without a lock: a worker that is killed while it holds one would hold it forever.
        self._stop = context.RawValue("b", 0)
        self._pool = ProcessPoolExecutor(
            num_processes, context, _start_worker, (build_block, self._num_done, self._stop, os.getpid())
        )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.value = int(kind is not None)
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def submit(self, blocks: Iterable[int]) -> dict[Future[None], int]:
        """Begin with the blocks; their futures."""
        return {self._pool.submit(_work, block): block for block in blocks}

    @property
    def num_done(self) -> int:
        """Samples so far, those of earlier calls included."""
        return int(self._num_done.value)


_worker: dict[str, Any] = {}


def _start_worker(build_block: BuildBlock, num_done: Any, stop: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent decides
    _worker.update(build_block=build_block, num_done=num_done)
    threading.Thread(target=_end_when_told, args=(stop, parent), daemon=True).start()


def _end_when_told(stop: Any, parent: int) -> None:
    """End this process when the build is given up, or its parent is gone: one that was killed cannot tell."""
    while not stop.value and os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _count() -> None:
    with _worker["num_done"].get_lock():
        _worker["num_done"].value += 1


def _work(block: int) -> None:
    _worker["build_block"](block, _count)
