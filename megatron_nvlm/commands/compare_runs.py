"""Whether two runs computed the same, step by step and digit for digit.

  python -m tools.compare_runs RUN_DIR OTHER_RUN_DIR [--first-step N] [--last-step N] [--order]

Compared are loss, gradient norm and consumed samples of metrics.jsonl, as written; with --order also the keys of the samples
of each step (ledger.jsonl, written where data.ledger is true). Prints one line. Exit status: 0 equal, 1 different, 2 not
comparable. This is how a change is shown to be loss-identical (CONTRIBUTING.md).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.option_types import natural_int, positive_int
from megatron_nvlm.runs.run_dir import RunDir

COMPARED = ("loss", "grad_norm", "consumed_samples")


def read_steps(path: Path) -> dict[int, dict[str, Any]]:
    """One JSON object a step, by step.

    Raises:
        UserError: the file is missing, or a line is broken.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}; name the directory of a run that has made steps")
    steps = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            steps[int(record["step"])] = record
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: line {number} is no step of a run ({error}); remove it and compare again"
            ) from error
    return steps


def first_difference(
    one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], steps: list[int], keys: tuple[str, ...]
) -> str:
    """A sentence about the first step that differs; empty if none does."""
    for step in steps:
        for key in keys:
            if one[step][key] != other[step][key]:
                return f"step {step} differs in {key}: {one[step][key]!r} and {other[step][key]!r}"
    return ""


def shared_steps(one: dict[int, Any], other: dict[int, Any], first: int, last: int | None) -> list[int]:
    """Steps that both runs have within a range.

    Raises:
        UserError: there is none, or one run lacks a step of the other between those that both have.
    """
    within = [step for step in sorted({*one, *other}) if step >= first and (last is None or step <= last)]
    both = [step for step in within if step in one and step in other]
    if not both:
        raise UserError(
            f"the runs have no step in common from step {first} on; compare directories of the same run file"
        )
    lacking = [step for step in within if both[0] < step < both[-1] and step not in both]
    if lacking:
        raise UserError(f"step {lacking[0]} is in one of the runs only; a metrics.jsonl was cut or edited")
    if last is not None and both[-1] != last:
        raise UserError(
            f"the runs have steps in common up to {both[-1]} only, not to {last}; let the shorter one go on"
        )
    return both


def compare_runs(one: RunDir, other: RunDir, first: int, last: int | None, with_order: bool) -> tuple[bool, str]:
    """Whether the runs are equal, and a line that says so."""
    ours, theirs = read_steps(one.metrics), read_steps(other.metrics)
    steps = shared_steps(ours, theirs, first, last)
    difference = first_difference(ours, theirs, steps, COMPARED)
    if not difference and with_order:
        ours, theirs = read_steps(one.ledger), read_steps(other.ledger)
        difference = first_difference(ours, theirs, shared_steps(ours, theirs, steps[0], steps[-1]), ("keys",))
    if difference:
        return False, f"different: {difference}"
    what = ", ".join((*COMPARED, *(("sample order",) if with_order else ())))
    return True, f"equal: {len(steps)} steps ({steps[0]} to {steps[-1]}), digit for digit in {what}"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", type=RunDir.named, nargs=2, metavar="RUN_DIR")
    parser.add_argument("--first-step", type=natural_int, default=1, help="default 1")
    parser.add_argument(
        "--last-step", type=positive_int, help="which both must have (default: the last that both have)"
    )
    parser.add_argument("--order", action="store_true", help="compare the order of samples too (ledger.jsonl)")
    options = parser.parse_args(arguments)
    one, other = options.run_dirs
    try:
        equal, line = compare_runs(one, other, options.first_step, options.last_step, options.order)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(line)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
