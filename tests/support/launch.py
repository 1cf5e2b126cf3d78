"""The real commands: torchrun and the package's entry points as a user starts them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def command(module: str, ranks: int, *arguments: str) -> list[str]:
    """`torchrun --nproc-per-node RANKS -m MODULE ...`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process's without its own world of one, with the package importable and one thread a rank."""
    own_world = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in own_world}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), inherited.get("PYTHONPATH", ""))))
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def launch(
    module: str, ranks: int, *arguments: str, check: bool = True, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run to the end; a failure shows what was printed."""
    done = subprocess.run(
        command(module, ranks, *arguments), env=environment(), capture_output=True, text=True, timeout=timeout
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_command(module: str, *arguments: object) -> str:
    """A command line to its end, without a launcher; returns what it printed, and a failure shows its errors."""
    command_line = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command_line, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(module: str, ranks: int, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Run in the background, in a process group of its own, with Ctrl-C heard even if this process ignores it."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command(module, ranks, *arguments),
            env=environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
