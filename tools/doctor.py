"""What must hold before a run, on this machine or on every node: `python -m tools.doctor` (installed: `nvlm-doctor`)."""

import sys

from megatron_nvlm.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main())
