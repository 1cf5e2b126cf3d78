"""The model: InternViT, projectors and the decoder, declared as Megatron-core specs. Knows nothing of data files or training."""
