"""Shards to micro-batches: torch on the CPU; never Megatron-core."""
