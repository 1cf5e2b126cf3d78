"""Sends to trackers the steps that they do not have yet: `python -m tools.send_metrics RUN_DIR`.

For a run whose `logging.wandb` or `logging.mlflow` names a tracker that its nodes could not reach: call it afterwards on a
host with a network. The run keeps its id, so a later start goes on in the same place.
"""

import argparse
import sys

from megatron_nvlm.errors import UserError
from megatron_nvlm.runs.entry import user_errors_end_the_process
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.trackers.config import MlflowConfig, WandbConfig, check_installed, section_of
from megatron_nvlm.trackers.sender import alone, last_ending, make_senders
from megatron_nvlm.watching.run_state import check_has_a_run, read_config, train_steps_of


def send_metrics(run_dir: RunDir) -> list[str]:
    """Send what is missing; returns a line for each tracker.

    Raises:
        UserError: there is no run, no tracker, or one that did not take everything.
    """
    check_has_a_run(run_dir)
    config = read_config(run_dir)
    check_installed(section_of(config, "wandb", WandbConfig), section_of(config, "mlflow", MlflowConfig))
    with alone(run_dir, seconds=1):
        senders = make_senders(run_dir) if config else []
        if not senders:
            raise UserError(
                f"{run_dir.config} names no tracker; start the run once with logging.wandb.project or logging.mlflow.uri"
            )
        lines = []
        for sender in senders:
            before = sender.sent_step
            sender.go_on(at_once=True)
            sender.close(last_ending(run_dir, train_steps_of(run_dir, config), senders))
            if sender.failure:
                raise UserError(
                    f"{sender.tracker.name} did not take the metrics of {run_dir}; see above, then try again"
                )
            lines.append(f"{sender.tracker.name}: run {sender.run_id}, steps {before + 1} to {sender.sent_step} sent")
    return lines


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.send_metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=RunDir.named, metavar="RUN_DIR")
    options = parser.parse_args(arguments)
    print("\n".join(send_metrics(options.run_dir)))


if __name__ == "__main__":
    sys.exit(main())
