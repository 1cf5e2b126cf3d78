"""What can be known of a run on GPUs without one: mixed devices, waits of the host, memory, messages, compiled kernels."""
