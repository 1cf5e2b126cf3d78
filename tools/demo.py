"""Train, evaluate and report a tiny NVLM on a laptop: `python -m tools.demo` (installed: `nvlm-demo`)."""

from megatron_nvlm.demo.run import main

if __name__ == "__main__":
    main()
