"""Measuring answers against truths."""
