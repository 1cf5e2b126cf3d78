"""What a job asks before and after each start of a run: may it start, and does it go back into the queue?

Before: `... job_start before RUN_DIR --start 4711.0 --job 4711 --nodes n1,n2`; after: the same with `after` and `--status`;
`preflight` instead, where the doctor found something wrong and training did not start.
The answer on standard output is one line for the shell, `ACTION EXIT_CODE EXCLUDED_NODES`: the action is run, requeue or
end, and the nodes are separated by commas, `-` for none. Sentences for the user go to standard error.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence

from megatron_nvlm.exit_codes import ENDED_WELL
from megatron_nvlm.runs.entry import user_errors_end_the_process
from megatron_nvlm.runs.failures import RankFailure
from megatron_nvlm.runs.restart_policy import Decision, Start, decide
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.runs.start_history import Beginning, begin, end, end_unfit, starts_of


def before_start(run_dir: RunDir, start: str, job: str, nodes: Sequence[str], max_failures: int) -> None:
    """Answer `run`, unless earlier starts of this submission say otherwise; work out the end of one that was killed."""
    starts, unfinished = starts_of(run_dir, job)
    if unfinished is not None:
        # A request to stop that nobody carried out is still there: the job was stopped, it did not fail.
        starts = [*starts, _ended(end(run_dir, unfinished, None, run_dir.stop.exists()))]
    if starts:
        decision = decide(starts, max_failures)
        if not decision.requeue or set(decision.excluded_nodes) & set(nodes):
            _answer(decision)
            return
    shutil.rmtree(run_dir.failures, ignore_errors=True)
    run_dir.stop.unlink(missing_ok=True)
    begin(run_dir, start, job, nodes)
    print(f"run {ENDED_WELL} -")


def after_start(run_dir: RunDir, start: str, job: str, status: int, asked: bool, max_failures: int) -> None:
    """Answer whether the job goes back into the queue after the start that has just ended."""
    starts, unfinished = _begun(run_dir, start, job)
    last = _ended(end(run_dir, unfinished, status, asked))
    _answer(decide([*starts, last], max_failures))


def after_preflight(run_dir: RunDir, start: str, job: str, status: int, max_failures: int) -> None:
    """Answer what becomes of a job whose nodes the doctor has refused; those that are unfit are left out at once."""
    starts, unfinished = _begun(run_dir, start, job)
    _answer(decide([*starts, end_unfit(run_dir, unfinished, status)], max_failures))


def _begun(run_dir: RunDir, start: str, job: str) -> tuple[list[Start], Beginning]:
    """The earlier starts, and the one that is about to end."""
    starts, unfinished = starts_of(run_dir, job)
    if unfinished is None or unfinished.start != start:
        raise ValueError(f"start {start} never began: `before` comes first")
    return starts, unfinished


def _ended(end_of_start: tuple[Start, RankFailure | None]) -> Start:
    start, first = end_of_start
    if first is not None:
        print(f"the first failure was that of {first.describe()}", file=sys.stderr)
    return start


def _answer(decision: Decision) -> None:
    print(decision.reason, file=sys.stderr)
    if decision.excluded_nodes:
        print(
            f"nodes that failed twice or are not fit are left out: {', '.join(decision.excluded_nodes)}",
            file=sys.stderr,
        )
    nodes = ",".join(decision.excluded_nodes) or "-"
    print(f"{'requeue' if decision.requeue else 'end'} {decision.exit_code} {nodes}")


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Decide whether a start of a job may run, or the job is queued again.")
    parser.add_argument("when", choices=("before", "preflight", "after"))
    parser.add_argument("run_dir")
    parser.add_argument("--start", required=True, help="name of this start: JOB.RESTARTS")
    parser.add_argument("--job", required=True, help="the submission: all of its restarts, or its whole chain")
    parser.add_argument("--nodes", default="", help="names of its nodes, separated by commas")
    parser.add_argument("--status", type=int, default=0, help="exit status of the start")
    parser.add_argument("--asked", action="store_true", help="the start was asked to stop")
    parser.add_argument(
        "--max-failures", type=int, default=10, help="failed starts after which it is still queued again"
    )
    options = parser.parse_args(arguments)
    run_dir = RunDir.named(options.run_dir)
    if options.when == "before":
        nodes = [node for node in options.nodes.split(",") if node]
        before_start(run_dir, options.start, options.job, nodes, options.max_failures)
    elif options.when == "preflight":
        after_preflight(run_dir, options.start, options.job, options.status, options.max_failures)
    else:
        after_start(run_dir, options.start, options.job, options.status, options.asked, options.max_failures)


if __name__ == "__main__":
    sys.exit(main())
