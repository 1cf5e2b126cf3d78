"""Where every token goes: the heart of NVLM. Knows neither Megatron-core nor processes."""
