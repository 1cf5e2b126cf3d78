"""A loader's worker process: `python -m megatron_nvlm.data.loading.worker SOCKET MEMORY`, started by worker_pool.py.

It is a program of its own, not a fork (unsafe beside CUDA) and not a re-import of the caller's script: it imports neither
torch nor Megatron-core, so it starts in under a second and takes little memory. It ends when its parent does.
"""

import signal
import sys
from multiprocessing.connection import Connection

from megatron_nvlm.data.loading.tile_memory import TileMemory
from megatron_nvlm.data.loading.worker_tasks import Failed, Task, WorkerSetup, do_task
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.errors import UserError


def main() -> None:
    """Serve tasks until the parent closes the connection or is gone."""
    # Signals that ask a job to stop are the trainer's to answer; it ends its workers by closing their connections.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    memory = TileMemory.attach(int(sys.argv[2]))
    try:
        setup: WorkerSetup = connection.recv()
        try:
            sets = [ShardSet(folder, check=False, cache=setup.cache) for folder in setup.folders]
        except UserError as error:
            connection.send(Failed(str(error), True))
            return
        while True:
            task: Task = connection.recv()
            connection.send(do_task(task, sets, setup.pipeline, memory, setup.with_pixels))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    main()
