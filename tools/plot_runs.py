"""Runs compared in charts: `python -m tools.plot_runs RUN_DIR ...` (installed: `nvlm-plot-runs`)."""

import sys

from megatron_nvlm.commands.plot_runs import main

if __name__ == "__main__":
    sys.exit(main())
