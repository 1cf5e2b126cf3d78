"""Runs compared in charts: `python -m tools.plot_runs RUN_DIR [RUN_DIR ...]` writes runs.html and runs.png.

Drawn are loss, gradient norm, learning rate, throughput, gates, and losses of validation sets and sources where a run has
them. The page needs no network and no other file; it lists the keys in which the run files differ.
"""

import argparse
import sys
from pathlib import Path

from megatron_nvlm.errors import UserError
from megatron_nvlm.option_types import positive_int
from megatron_nvlm.runs.entry import user_errors_end_the_process
from megatron_nvlm.runs.run_dir import RunDir
from megatron_nvlm.watching.charts import to_picture
from megatron_nvlm.watching.comparison import AXES, draw_page, make_charts, open_runs
from megatron_nvlm.watching.run_state import check_has_a_run


def plot_runs(run_dirs: list[RunDir], out: Path, axis: str, smooth_steps: int) -> tuple[Path, Path]:
    """Write the page and the picture; returns their paths.

    Raises:
        UserError: a directory holds no run, or none of them has made a step.
    """
    for run_dir in run_dirs:
        check_has_a_run(run_dir)
    runs = open_runs(run_dirs)
    charts = make_charts(runs, axis, smooth_steps)
    if not charts:
        raise UserError(
            f"no step is in {' and '.join(str(run.metrics) for run in run_dirs)}; let a run make some first"
        )
    stem = str(out).removesuffix(".html").removesuffix(".png")
    page, picture = Path(f"{stem}.html"), Path(f"{stem}.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(draw_page(runs, charts))
    to_picture(charts, [(run.name, run.colour) for run in runs]).save(picture)
    return page, picture


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot_runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", type=RunDir.named, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="files to write, without ending (default runs)")
    parser.add_argument("--over", choices=AXES, default="step", help="horizontal axis (default step)")
    parser.add_argument("--smooth", type=positive_int, default=1, help="steps of a running mean (default 1: none)")
    options = parser.parse_args(arguments)
    written = plot_runs(options.run_dirs, options.out, options.over, options.smooth)
    print(f"wrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    sys.exit(main())
