"""Before a run: `python -m tools.doctor [--config FILE --world-size N key=value ...]`, alone on one machine.

Under torchrun, one process a GPU on all nodes, it also compares the ranks and names the nodes that are not fit; the job
scripts' `--preflight` starts it so. Exit status: 0 if all is well; 2 if something is to mend; 12 if nodes are unfit.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.config.load import load_run
from megatron_nvlm.doctor.findings import Finding, Verdict, bad, good, is_green, or_sentence, render
from megatron_nvlm.doctor.gpus import check_gpus, multiply, run_command
from megatron_nvlm.doctor.ranks import compare, measure
from megatron_nvlm.doctor.run_file import check_data, check_layout, check_weights
from megatron_nvlm.doctor.software import check_versions
from megatron_nvlm.doctor.storage import check_clock, check_shared_memory, check_speed
from megatron_nvlm.errors import UserError
from megatron_nvlm.exit_codes import UNFIT_NODES, USER_ERROR
from megatron_nvlm.option_types import natural_float, positive_float, rank_count
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.runs.entry import user_errors_end_the_process
from megatron_nvlm.runs.failures import node_name
from megatron_nvlm.runs.resolve import ResolvedRun, resolve_run
from megatron_nvlm.runs.run_dir import RunDir


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron_nvlm.commands.doctor", description="What must hold before a run.")
    parser.add_argument(
        "--config", help="run file, or the name of one of configs/; without it this machine alone is looked at"
    )
    parser.add_argument("--world-size", type=rank_count, default=1, help="ranks (GPUs) of the run (%(default)s)")
    parser.add_argument("--gpu-memory-gib", type=positive_float, help="of a GPU (that of this machine's, else 80)")
    parser.add_argument(
        "--least-megabytes", type=natural_float, default=50, help="a second, written to run_dir (%(default)s)"
    )
    parser.add_argument(
        "--own-check", default="", help="a command of your cluster's that ends with 0 on a healthy node"
    )
    parser.add_argument("--quick", action="store_true", help="leave out what takes more than seconds")
    parser.add_argument(
        "--job-start", default="", help="under torchrun: name of the start that preflight.json is about"
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    return parser.parse_args(arguments)


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _options(arguments)
    code = _on_all_nodes(options) if "WORLD_SIZE" in os.environ else _alone(options)
    if code:
        sys.exit(code)


def _alone(options: argparse.Namespace) -> int:
    run, findings = _read_run(options, options.world_size)
    findings += _node_findings(options, run)
    if run is not None:
        findings += [check_data(run), check_weights(run)]
        if not options.quick:
            findings += _layout(run, options)
    print(render(f"{node_name()}, {options.config or 'no run file'}", findings))
    return 0 if is_green(findings) else USER_ERROR


def _read_run(options: argparse.Namespace, world_size: int) -> tuple[ResolvedRun | None, list[Finding]]:
    if options.config is None:
        return None, []
    try:
        run = resolve_run(load_run(options.config, options.overrides), world_size)
    except UserError as error:
        return None, [bad("run file", str(error))]
    return run, [good("run file", f"valid for {world_size} ranks")]


def _layout(run: ResolvedRun, options: argparse.Namespace) -> list[Finding]:
    try:
        return list(check_layout(run, options.gpu_memory_gib))
    except UserError as error:
        return [bad("layout", str(error))]


def _node_findings(options: argparse.Namespace, run: ResolvedRun | None) -> list[Finding]:
    run_dir = run.run_dir.path if run is not None else Path.cwd()
    findings = [
        *check_versions(run.config.model.backend if run is not None else "local"),
        *check_gpus(),
        check_shared_memory(),
        or_sentence("clock", lambda: check_clock(run_dir)),
    ]
    if not options.quick:
        findings.append(or_sentence("file system", lambda: check_speed(run_dir, options.least_megabytes)))
        if options.own_check:
            findings.append(run_command(options.own_check))
    return findings


def _on_all_nodes(options: argparse.Namespace) -> int:
    """Every rank calls it; rank 0 prints and writes preflight.json."""
    device = use_device()
    dist.init_process_group(device.communication)
    local_rank, node = int(os.environ["LOCAL_RANK"]), node_name()
    run, of_run = _read_run(options, dist.get_world_size())
    own = _node_findings(options, run) if local_rank == 0 else []
    if local_rank == 0 and run is not None:
        own.append(check_data(run))
    everyone: list[tuple[str, list[Finding]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(everyone, (node, own))
    dist.barrier()  # so that no rank multiplies while another one writes
    measured = measure(node, local_rank, multiply(device.torch_device), device.torch_device)
    about = [(name, finding) for name, findings in everyone for finding in findings]
    about += [("", finding) for finding in of_run] + list(compare(measured))
    unfit = sorted({name for name, finding in about if finding.of_node and finding.verdict is Verdict.BAD})
    rank = dist.get_rank()
    if rank == 0:
        nodes = list(dict.fromkeys(one.node for one in measured))
        print(
            render(f"{len(nodes)} nodes, {dist.get_world_size()} ranks: {', '.join(nodes)}", list(_page(about, nodes)))
        )
        if run is not None and options.job_start:
            _write(run.run_dir, options.job_start, unfit, about)
    dist.destroy_process_group()
    if rank:
        return 0  # one rank tells the launcher
    if unfit:
        return UNFIT_NODES
    return 0 if is_green(finding for _, finding in about) else USER_ERROR


def _page(about: list[tuple[str, Finding]], nodes: list[str]) -> Iterator[Finding]:
    """What is the same on every node once; what is not, with its node."""
    for finding in dict.fromkeys(finding for _, finding in about):
        named = [node for node, other in about if other == finding]
        everywhere = len(named) == len(nodes) or "" in named
        where = "" if everywhere else f"{', '.join(named)}: "
        yield Finding(finding.subject, finding.verdict, f"{where}{finding.sentence}", finding.of_node)


def _write(run_dir: RunDir, start: str, unfit: list[str], about: list[tuple[str, Finding]]) -> None:
    run_dir.path.mkdir(parents=True, exist_ok=True)
    wrong = [{"node": node, "sentence": finding.sentence} for node, finding in about if finding.verdict is Verdict.BAD]
    run_dir.preflight.write_text(json.dumps({"start": start, "unfit_nodes": unfit, "wrong": wrong}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
