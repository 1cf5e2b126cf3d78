"""Which samples make which micro-batch: pure functions, no files and no processes."""
