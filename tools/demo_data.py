"""Make the demo's shards: `python -m tools.demo_data` (installed: `nvlm-demo-data`)."""

from megatron_nvlm.demo.data import main

if __name__ == "__main__":
    main()
