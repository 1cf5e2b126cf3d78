"""What a run directory tells of its run, for people: pages and plots."""
