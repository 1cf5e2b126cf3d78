"""Processes and threads that turn the order into micro-batches."""
