"""Scores of answers, as the paper's evaluation scripts and as today's harnesses define them: pure functions, no state."""
