"""Steps that trackers do not have yet: `python -m tools.send_metrics RUN_DIR` (installed: `nvlm-send-metrics`)."""

import sys

from megatron_nvlm.commands.send_metrics import main

if __name__ == "__main__":
    sys.exit(main())
