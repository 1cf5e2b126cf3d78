"""Sends the steps of metrics.jsonl to trackers: `python -m megatron_nvlm.trackers.sender RUN_DIR`, beside training.

It is a process of its own, so no tracker, server or network can hold up or end training. It reads what training wrote, and
keeps in trackers.json what was sent: without a network the steps wait in the run directory, for the network or for the
next start, and a run that goes on is taken up under the same id. Training says `end` on its standard input when it is done.
"""

import argparse
import fcntl
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import yaml

from megatron_nvlm.errors import UserError
from megatron_nvlm.metrics_lines import LineFollower, is_step, numbers_of
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.trackers.config import MlflowConfig, WandbConfig, section_of
from megatron_nvlm.trackers.mlflow_tracker import MlflowTracker
from megatron_nvlm.trackers.tracker import Ending, StepNumbers, TrackedRun, Tracker
from megatron_nvlm.trackers.wandb_tracker import WandbTracker
from megatron_nvlm.whole_files import write_whole_text

LOOK_SECONDS = 1.0
FIRST_PAUSE, LONGEST_PAUSE = 15.0, 600.0
"""Seconds after a failure before the next try, doubled each time (our choice)."""
END_SECONDS = 60
"""For the rest, after training has ended (our choice)."""
LOCK_SECONDS = END_SECONDS + 15
"""For the sender of an earlier start to end."""
_BYTES_AT_ONCE = 1 << 20
WORD = b"end\n"


def step_numbers(record: Mapping[str, Any]) -> StepNumbers:
    """A step as trackers get it: every number, rates, and 1 for an update that was left out."""
    numbers = numbers_of(record)
    step = int(numbers.pop("step"))
    if numbers.get("seconds", 0) > 0:
        for name in ("samples", "tokens", "tiles"):
            if name in numbers:
                numbers[f"{name}_per_second"] = numbers[name] / numbers["seconds"]
    numbers["skipped"] = float(bool(record.get("skipped")))
    slow = record.get("stragglers")
    numbers["stragglers"] = float(len(slow)) if isinstance(slow, list) else 0.0
    return step, numbers


class Sender:
    """Sends to one tracker what it does not have yet."""

    def __init__(self, tracker: Tracker, run: TrackedRun) -> None:
        self.tracker, self.run = tracker, run
        self.run_dir = RunDir(run.run_dir)
        known = _read_known(self.run_dir).get(tracker.name, {})
        self.run_id: str | None = known.get("id")
        self.sent_step: int = known.get("step", 0)
        self.failure = ""
        """Why the last try failed; empty after one that did not."""
        self._file = LineFollower(self.run_dir.metrics, _BYTES_AT_ONCE)
        self._waiting: list[StepNumbers] = []
        self._is_open = False
        self._pause, self._next_try = FIRST_PAUSE, 0.0

    def go_on(self, at_once: bool = False) -> None:
        """Send what is new, unless a failure was too recent.

        Args:
            at_once: try even so.
        """
        if not at_once and time.monotonic() < self._next_try:
            return
        try:
            if not self._is_open:
                self._open()
            while self._waiting or self._read():
                if self._waiting:
                    self.tracker.send(self._waiting)
                    self.sent_step = self._waiting[-1][0]
                    self._waiting = []
                    self._remember()
            if self.failure:
                _say(f"{self.tracker.name} takes metrics again, the ones that waited too")
            self.failure, self._pause = "", FIRST_PAUSE
        except Exception as error:  # any error of a foreign package: training goes on
            self._note(error)

    def close(self, ending: Ending) -> None:
        """Send the rest and say how training ended."""
        self.go_on(at_once=True)
        if self._is_open and not self.failure:
            try:
                self.tracker.close(ending)
            except Exception as error:
                self._note(error)

    def _open(self) -> None:
        self.run_id = self.tracker.open(self.run_id, self.run)
        self._is_open = True
        self._remember()

    def _read(self) -> bool:
        """Read on; returns whether there was anything. Steps made again after a resume are the same and not sent again."""
        news = self._file.read()
        steps = map(step_numbers, filter(is_step, news.records))
        self._waiting += [(step, numbers) for step, numbers in steps if step > self.sent_step]
        return bool(news.records)

    def _remember(self) -> None:
        known = {**_read_known(self.run_dir), self.tracker.name: {"id": self.run_id, "step": self.sent_step}}
        write_whole_text(self.run_dir.trackers, json.dumps(known) + "\n")

    def _note(self, error: Exception) -> None:
        if not self.failure:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            _say(
                f"{self.tracker.name} does not take metrics ({reason}); training goes on, the steps after "
                f"{self.sent_step} wait in {self.run_dir.metrics} and are sent later"
            )
        self.failure = str(error) or type(error).__name__
        self._next_try = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


def _say(sentence: str) -> None:
    with suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def _read_known(run_dir: RunDir) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        known = json.loads(run_dir.trackers.read_text())
        if isinstance(known, dict):
            return known
    return {}


def make_senders(run_dir: RunDir) -> list[Sender]:
    """A sender for each tracker that the run file in force names."""
    settings = yaml.safe_load(run_dir.config.read_text())
    run = TrackedRun(run_dir.path.resolve().name, run_dir.path, settings)
    wandb, mlflow = section_of(settings, "wandb", WandbConfig), section_of(settings, "mlflow", MlflowConfig)
    trackers: list[Tracker] = []
    if wandb.project is not None:
        trackers.append(WandbTracker(wandb))
    if mlflow.uri is not None:
        trackers.append(MlflowTracker(mlflow))
    return [Sender(tracker, run) for tracker in trackers]


@contextmanager
def alone(run_dir: RunDir, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Be the only sender of a run while the block lasts.

    Raises:
        UserError: another one works after `seconds`, too.
    """
    with run_dir.trackers_lock.open("a") as file:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UserError(f"another process sends the metrics of {run_dir} already; let it end") from error
                time.sleep(0.2)
            except OSError:  # some network file systems have no locks
                break
        yield


def last_ending(run_dir: RunDir, train_steps: int | None, senders: Iterable[Sender]) -> Ending:
    """How training ended that said so: finished with its last step, or stopped when asked."""
    done = train_steps is not None and any(sender.sent_step >= train_steps for sender in senders)
    return Ending.FINISHED if done or run_dir.finished.exists() else Ending.STOPPED


def follow(run_dir: RunDir, train_steps: int, parent: int) -> None:
    """Send until training ends, and then the rest."""
    senders = make_senders(run_dir)
    while not (word := _wait_for_word(parent)):
        for sender in senders:
            sender.go_on()
    # Packages wait for a lost network without an end, and training may be gone that would end this process.
    limit = threading.Timer(END_SECONDS, os._exit, (1,))
    limit.daemon = True
    limit.start()
    for sender in senders:
        sender.go_on(at_once=True)
    for sender in senders:
        sender.close(last_ending(run_dir, train_steps, senders) if word == WORD else Ending.FAILED)


def _wait_for_word(parent: int) -> bytes:
    """What training says, or that it is gone; nothing after a while of silence."""
    if select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        return os.read(sys.stdin.fileno(), len(WORD)) or b"gone\n"
    # A process that training has forked may hold the other end open.
    return b"" if os.getppid() == parent else b"gone\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line, for trackers/beside.py."""
    parser = argparse.ArgumentParser(prog="python -m megatron_nvlm.trackers.sender", description=__doc__)
    parser.add_argument("run_dir", type=RunDir.named)
    parser.add_argument("--train-steps", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="process that trains")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # for training, which then says when it has ended
        signal.signal(number, signal.SIG_IGN)
    try:
        with alone(options.run_dir):
            follow(options.run_dir, options.train_steps, options.parent)
    except (UserError, OSError, yaml.YAMLError) as error:
        _say(f"trackers get no metrics: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
