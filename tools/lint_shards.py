"""Check shards before they are trained on: `python -m tools.lint_shards` (installed: `nvlm-lint-shards`)."""

from megatron_nvlm.commands.lint_shards import main

if __name__ == "__main__":
    main()
