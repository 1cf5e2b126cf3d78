"""The model: InternViT, projectors and the decoder as Megatron-core specs. Knows nothing of data files or training."""
