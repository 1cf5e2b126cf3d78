"""Triton kernels of the operations in `ops`, each beside its plain form there. Only `ops` imports them."""
