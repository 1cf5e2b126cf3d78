"""The model for Hugging Face transformers; `hf/companions.py` copies these files into exported folders."""
