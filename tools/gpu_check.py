"""A GPU's training step and kernels, without a GPU: `python -m tools.gpu_check` (installed: `nvlm-gpu-check`)."""

import sys

from megatron_nvlm.commands.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
