"""Families of language and vision models: their sizes, and how their folders name them."""
