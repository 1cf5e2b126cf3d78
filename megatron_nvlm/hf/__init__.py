"""Hugging Face folders: read, written, converted, compared."""
