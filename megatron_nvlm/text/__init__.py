"""Text to token ids: tokenizer and conversation templates. Neither torch nor Megatron-core."""
