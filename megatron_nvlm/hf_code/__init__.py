"""The model for Hugging Face transformers; `checkpoint/hf_files.py` copies these files into exported folders."""
