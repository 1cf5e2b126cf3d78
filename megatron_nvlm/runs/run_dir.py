"""The files of a run directory, by name: the only place that spells them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """Paths below the directory of one run; none needs to exist."""

    path: Path

    @classmethod
    def named(cls, path: str | Path) -> "RunDir":
        """The run directory at a path."""
        return cls(Path(path))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        """The resolved run file, as training read it."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints (checkpoint/retention.py)."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def trackers(self) -> Path:
        """Under which id a tracker (Weights & Biases, MLflow) knows the run, and the last step it was sent, as JSON."""
        return self.path / "trackers.json"

    @property
    def trackers_lock(self) -> Path:
        """Locked by the process that sends metrics to trackers."""
        return self.path / "trackers.lock"

    @property
    def tensorboard(self) -> Path:
        """Folder of the TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def validation_at_start(self) -> Path:
        """Losses of the validation sets before step 1, as JSON (training/validation.py)."""
        return self.path / "validation_at_start.json"

    @property
    def quarantine(self) -> Path:
        """One JSON object a bad sample: step, key, shard, number (index in its set), kind, reason, source."""
        return self.path / "quarantine.jsonl"

    @property
    def skipped(self) -> Path:
        """One JSON object for each update that was left out: step, reason, keys of its samples."""
        return self.path / "skipped.jsonl"

    @property
    def heartbeat(self) -> Path:
        """What rank 0 does at the moment, as JSON, renewed every few seconds (training/watchdog.py)."""
        return self.path / "heartbeat.json"

    @property
    def ledger(self) -> Path:
        """One JSON object a step: step, keys (of the samples used, in the order of the run)."""
        return self.path / "ledger.jsonl"

    @property
    def stop(self) -> Path:
        """A request to stop: when this file exists, the run saves, removes it and ends."""
        return self.path / "stop"

    @property
    def stopped(self) -> Path:
        """There once a request to stop was carried out, until the next start; holds the step that was saved."""
        return self.path / "stopped"

    @property
    def finished(self) -> Path:
        """There once the last step is done, until the run is given more; holds that step."""
        return self.path / "finished"

    @property
    def starts(self) -> Path:
        """One JSON object for the beginning and one for the end of each start of a job (runs/start_history.py)."""
        return self.path / "starts.jsonl"

    @property
    def preflight(self) -> Path:
        """What the doctor found on the nodes of the last start that asked it: start, unfit nodes, findings."""
        return self.path / "preflight.json"

    @property
    def failures(self) -> Path:
        """Folder of what the launchers of the last start's nodes saw (runs/failures.py)."""
        return self.path / "failures"

    @property
    def failure(self) -> Path:
        """The first failure of the last start that failed, as JSON."""
        return self.path / "failure.json"

    @property
    def logs(self) -> Path:
        """Folder of what each rank but 0 printed, with `logging.rank_files`."""
        return self.path / "logs"

    @property
    def profile(self) -> Path:
        """Folder of traces and tables of the steps that `training.profile` names, by steps and rank."""
        return self.path / "profile"

    @property
    def partial_saves(self) -> list[Path]:
        """Folders of checkpoints that were begun and are not complete."""
        return sorted(self.checkpoints.glob(".*.partial"))

    @property
    def lock(self) -> Path:
        """Locked by the process that works in the directory."""
        return self.path / "lock"

    @property
    def evaluation(self) -> Path:
        """Accuracies and answers of `megatron_nvlm.evaluate`."""
        return self.path / "evaluation.json"

    @property
    def report(self) -> Path:
        """The demo's page."""
        return self.path / "report.html"
