"""What must hold on a machine before a run: each check finds one thing, and says how it is mended."""
