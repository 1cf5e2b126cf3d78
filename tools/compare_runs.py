"""Whether two runs computed the same: `python -m tools.compare_runs` (installed: `nvlm-compare-runs`)."""

import sys

from megatron_nvlm.commands.compare_runs import main

if __name__ == "__main__":
    sys.exit(main())
