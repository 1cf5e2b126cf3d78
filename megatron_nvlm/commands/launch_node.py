"""A node's part of a job: torchrun, which leaves word of what failed in the run directory.

`... launch_node RUN_DIR START [options of torchrun] -m megatron_nvlm.train ...`. torchrun by itself returns
1 for every failure and prints a traceback of its own; this returns the exit code of the rank that failed first and prints
one line for each.
"""

import argparse
import sys
from collections.abc import Sequence

from torch.distributed import DistError
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError

from megatron_nvlm.runs.failures import NodeReport, RankFailure, first_failure, node_name, write_report
from megatron_nvlm.runs.run_dir import RunDir

NOT_MET = (
    "see whether a node was lost, whether the nodes reach each other's names and ports, and NCCL_SOCKET_IFNAME in "
    "launch/cluster.env"
)


def launch(run_dir: RunDir, start: str, arguments: Sequence[str]) -> int:
    """Run torchrun to its end, write the report of this node, and return an exit code."""
    node = node_name()
    failures: tuple[RankFailure, ...] = ()
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as error:
        failures = tuple(_rank_failure(rank, node, failure) for rank, failure in sorted(error.failures.items()))
    except SignalException as error:
        _leave_word(run_dir, NodeReport(start, node, ()))
        return 128 + int(error.sigval)
    except (RendezvousError, DistError) as error:
        # No report: this node left no word, so that it may be to blame if the others did.
        print(
            f"failed: {node} did not meet the other nodes ({_in_words(error)}); {NOT_MET}", file=sys.stderr, flush=True
        )
        return 1
    report = NodeReport(start, node, failures)
    _leave_word(run_dir, report)
    for failure in failures:
        print(f"failed: {failure.describe()}", file=sys.stderr, flush=True)
    first = first_failure([report])
    if first is None:
        return 0
    return first.exit_code if first.exit_code > 0 else 128 - first.exit_code


def _leave_word(run_dir: RunDir, report: NodeReport) -> None:
    """Write the report; the exit code stands where it cannot be written."""
    try:
        write_report(run_dir, report)
    except OSError as error:
        print(f"the report of {report.node} could not be written ({error})", file=sys.stderr, flush=True)


def _in_words(error: RendezvousError | DistError) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _rank_failure(rank: int, node: str, failure: ProcessFailure) -> RankFailure:
    told = failure.error_file_data.get("message") if failure.error_file_data else None
    details = told if isinstance(told, dict) else {}
    time = float(details.get("extraInfo", {}).get("time", failure.timestamp))
    return RankFailure(rank, node, failure.exitcode, time, str(details.get("message", "")))


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Run torchrun on this node and leave word of what failed.")
    parser.add_argument("run_dir")
    parser.add_argument("start", help="name of this start: JOB.RESTARTS")
    parser.add_argument("torchrun", nargs=argparse.REMAINDER, help="what follows is torchrun's")
    options = parser.parse_args(arguments)
    return launch(RunDir.named(options.run_dir), options.start, options.torchrun)


if __name__ == "__main__":
    sys.exit(main())
