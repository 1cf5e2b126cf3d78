"""Weights & Biases and MLflow: a process beside training sends them what metrics.jsonl has."""
