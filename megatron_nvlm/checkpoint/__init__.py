"""Saving, loading and naming weights."""
