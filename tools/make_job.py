"""Write a job for Slurm, Kubernetes or SkyPilot: `python -m tools.make_job` (in a checkout)."""

import sys

from megatron_nvlm.commands.make_job import main

if __name__ == "__main__":
    sys.exit(main())
