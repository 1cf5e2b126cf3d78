"""Tensor operations of NVLM, each first as readable PyTorch. Knows nothing of models or processes."""
