"""Convert checkpoints and Hugging Face folders: `python -m tools.convert_checkpoint`, `nvlm-convert-checkpoint`."""

from megatron_nvlm.commands.convert_checkpoint import main

if __name__ == "__main__":
    main()
