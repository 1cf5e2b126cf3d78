"""Compare a checkpoint with its Hugging Face folder: `python -m tools.score` (installed: `nvlm-score`)."""

import sys

from megatron_nvlm.commands.score import main

if __name__ == "__main__":
    sys.exit(main())
