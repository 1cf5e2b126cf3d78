"""Exit codes of training and of the jobs around it; `launch/README.md` has a table of what training returns."""

ENDED_WELL = 0
"""Finished, or stopped when asked; the files `finished` and `stopped` of the run directory tell which."""
USER_ERROR = 2
"""A mistake or a file system that the user can fix: the same start would fail again."""
WATCHDOG = 3
"""A rank waited for longer than `training.timeout_seconds`."""
NO_PROGRESS = 10
"""Of a job: two starts in a row did not complete a step."""
TOO_MANY_FAILURES = 11
"""Of a job: more starts failed than the job may repeat."""
