"""NVLM-D, NVLM-X and NVLM-H (arXiv 2409.11402) on Megatron-core. Importing the package imports nothing else."""

__version__ = "0.1.0"
