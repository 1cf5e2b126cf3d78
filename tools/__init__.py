"""Command lines of a checkout: `python -m tools.NAME`. Their work lives in the package; this folder is never installed."""
