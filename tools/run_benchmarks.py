"""Benchmarks of a run or an exported folder: `python -m tools.run_benchmarks` (installed: `nvlm-run-benchmarks`)."""

import sys

from megatron_nvlm.commands.run_benchmarks import main

if __name__ == "__main__":
    sys.exit(main())
