"""Benchmarks of a model: answers, scores and one table beside the paper's."""
