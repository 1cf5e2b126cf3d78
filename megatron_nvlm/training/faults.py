"""Being asked to stop: a signal to any rank, or a file `stop` in the run directory; all ranks stop after the same step."""

import signal
from pathlib import Path
from types import FrameType

STOP_FILE = "stop"
FINISHED_FILE = "finished"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Listens from creation on; `asked` is this rank's answer, which the step's collective shares with all ranks."""

    def __init__(self, run_dir: Path) -> None:
        self._stop_file = run_dir / STOP_FILE
        self._signalled = False
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    @property
    def asked(self) -> bool:
        """Whether this rank has seen a signal or the file."""
        return self._signalled or self._stop_file.exists()
