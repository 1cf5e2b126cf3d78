"""A run in the terminal, live or ended: `python -m tools.watch RUN_DIR` (installed: `nvlm-watch`)."""

import sys

from megatron_nvlm.commands.watch import main

if __name__ == "__main__":
    sys.exit(main())
