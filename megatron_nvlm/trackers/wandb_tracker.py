"""Weights & Biases. Its own service keeps what it was handed in RUN_DIR/wandb until the network takes it."""

import os
import uuid
from collections.abc import Sequence
from typing import Any

from megatron_nvlm.trackers.config import WandbConfig
from megatron_nvlm.trackers.tracker import Ending, StepNumbers, TrackedRun

START_SECONDS = 60
"""For the server to take up the run (our choice)."""


class WandbTracker:
    """A run of Weights & Biases."""

    name = "wandb"

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        self._run: Any = None

    def open(self, run_id: str | None, run: TrackedRun) -> str:
        """Take the run up; the id is chosen here, so that a start without network has one too."""
        os.environ.setdefault("WANDB_SILENT", "true")  # read when the package is imported
        import wandb

        run_id = run_id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=self.config.project,
            name=self.config.name or run.name,
            id=run_id,
            resume="allow",
            dir=str(run.run_dir),
            config=dict(run.settings),
            mode=self.config.mode,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, console="off", init_timeout=START_SECONDS),
        )
        return run_id

    def send(self, steps: Sequence[StepNumbers]) -> None:
        """Hand steps to the service of Weights & Biases, which sends them when it can."""
        for step, numbers in steps:
            self._run.log(dict(numbers), step=step)

    def close(self, ending: Ending) -> None:
        """Wait until the service has sent everything."""
        self._run.finish(exit_code=1 if ending is Ending.FAILED else 0)
