"""What the steps of a run compute, and what their devices could: arithmetic alone."""
