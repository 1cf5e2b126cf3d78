"""One sample as the model will see it: `python -m tools.inspect_sample` (installed: `nvlm-inspect-sample`)."""

from megatron_nvlm.commands.inspect_sample import main

if __name__ == "__main__":
    main()
