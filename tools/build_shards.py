"""Build WebDataset shards from users' files: `python -m tools.build_shards` (installed: `nvlm-build-shards`)."""

from megatron_nvlm.commands.build_shards import main

if __name__ == "__main__":
    main()
