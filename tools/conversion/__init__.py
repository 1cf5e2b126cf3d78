"""Parts of tools/convert_checkpoint.py and tools/score.py."""
