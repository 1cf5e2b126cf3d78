"""Devices, process groups and what crosses them."""
