"""A page in the terminal about a run that trains or has ended: `python -m tools.watch RUN_DIR`.

It shows the state, time left, losses, throughput, gates, tiles, slow ranks, bad samples and restarts, from the files of
the run directory alone: it talks to no process and writes nothing, so it may run on any host that sees the directory.
The page is renewed until Ctrl-C; with --once, or where the output is no terminal, it is printed once.
"""

import argparse
import sys
import time
from contextlib import suppress

from rich.console import Console
from rich.live import Live

from megatron_nvlm.option_types import positive_float
from megatron_nvlm.runs.entry import user_errors_end_the_process
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.watching.page import RunPage
from megatron_nvlm.watching.run_state import check_has_a_run


def watch(run_dir: RunDir, console: Console, every_seconds: float, once: bool) -> None:
    """Show the page, until Ctrl-C or once."""
    page = RunPage(run_dir)
    if once:
        console.print(page.render(console.width))
        return
    with Live(page.render(console.width), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(every_seconds)
            live.update(page.render(console.width), refresh=True)


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=RunDir.named, metavar="RUN_DIR")
    parser.add_argument("--once", action="store_true", help="print one page and end")
    parser.add_argument("--every", type=positive_float, default=2.0, help="seconds between two looks (default 2)")
    options = parser.parse_args(arguments)
    console = Console()
    check_has_a_run(options.run_dir)
    with suppress(KeyboardInterrupt):
        watch(options.run_dir, console, options.every, options.once or not console.is_terminal)


if __name__ == "__main__":
    sys.exit(main())
