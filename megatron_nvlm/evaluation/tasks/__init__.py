"""Benchmarks as data: a YAML file each, and their reader."""
