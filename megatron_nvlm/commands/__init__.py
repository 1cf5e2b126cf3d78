"""Command lines: arguments in, one call, a sentence out."""
