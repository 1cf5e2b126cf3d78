"""MLflow: a server, a database or a folder."""

import os
import time
from collections.abc import Sequence
from typing import Any

from megatron_nvlm.dotted_keys import dotted_keys, in_words
from megatron_nvlm.trackers.config import MlflowConfig
from megatron_nvlm.trackers.tracker import Ending, StepNumbers, TrackedRun

METRICS_AT_ONCE, PARAMETERS_AT_ONCE, PARAMETER_CHARACTERS = 1000, 100, 500
"""Most that every server of MLflow takes in one request, and of one value."""
STATUS = {Ending.FINISHED: "FINISHED", Ending.STOPPED: "KILLED", Ending.FAILED: "FAILED"}
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""The sender tries again by itself, and must not wait for minutes when training ends."""


class MlflowTracker:
    """A run of MLflow."""

    name = "mlflow"

    def __init__(self, config: MlflowConfig) -> None:
        self.config = config
        self._client: Any = None
        self._run_id = ""

    def open(self, run_id: str | None, run: TrackedRun) -> str:
        """Take the run up, or create it with the keys of its run file as parameters."""
        for name, value in {**_PATIENCE, "MLFLOW_ALLOW_FILE_STORE": "true"}.items():  # a folder is what the user named
            os.environ.setdefault(name, value)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self.config.uri)
        if run_id is not None:
            self._run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        experiment = self._client.get_experiment_by_name(self.config.experiment)
        place = experiment.experiment_id if experiment else self._client.create_experiment(self.config.experiment)
        self._run_id = self._client.create_run(place, run_name=run.name).info.run_id
        parameters = [Param(key, in_words(value)[:PARAMETER_CHARACTERS]) for key, value in dotted_keys(run.settings)]
        for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._run_id, params=parameters[start : start + PARAMETERS_AT_ONCE])
        return self._run_id

    def send(self, steps: Sequence[StepNumbers]) -> None:
        """Send steps; returns when the server has them."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for step, numbers in steps for key, value in numbers.items()]
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + METRICS_AT_ONCE])

    def close(self, ending: Ending) -> None:
        """Set the status of the run."""
        self._client.set_terminated(self._run_id, STATUS[ending])
