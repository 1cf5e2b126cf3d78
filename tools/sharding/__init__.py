"""The parts of tools/build_shards.py and tools/lint_shards.py."""
