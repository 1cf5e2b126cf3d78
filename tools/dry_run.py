"""Memory, FLOPs and predicted time of a run, without running it: `python -m tools.dry_run` (installed: `nvlm-dry-run`)."""

import sys

from megatron_nvlm.commands.dry_run import main

if __name__ == "__main__":
    sys.exit(main())
