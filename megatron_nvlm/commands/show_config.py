"""Print one value of a run file as training reads it: `... show_config KEY FILE [key=value ...]`."""

import argparse
import operator
import sys

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.config.load import load_run
from megatron_nvlm.errors import UserError
from megatron_nvlm.runs.entry import user_errors_end_the_process
from megatron_nvlm.runs.resolve import resolve_run


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Print one value of a run file.")
    parser.add_argument("key", help="run_dir, training.train_steps, ...")
    parser.add_argument("config")
    parser.add_argument("--world-size", type=int, help="check the run for this number of processes, too")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    run = load_run(options.config, options.overrides)
    if options.world_size is not None:
        resolve_run(run, options.world_size)
    try:
        print(operator.attrgetter(options.key)(run))
    except AttributeError as error:
        raise UserError(f"a run has no key {options.key} ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
