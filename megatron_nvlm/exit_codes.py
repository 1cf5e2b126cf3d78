"""Exit codes of training and of the jobs around it; `launch/README.md` has the table for users."""

ENDED_WELL = 0
"""Finished, or stopped when asked; the files `finished` and `stopped` of the run directory tell which."""
USER_ERROR = 2
"""A mistake or a file system that the user can fix: the same start would fail again."""
WATCHDOG = 3
"""A rank waited for longer than `training.timeout_seconds`."""
DIVERGED = 4
"""The loss, the gradient norm, a weight or the optimizer's state is not finite: the same start would meet it again."""
NO_PROGRESS = 10
"""Of a job: starts in a row saved no new checkpoint."""
TOO_MANY_FAILURES = 11
"""Of a job: more starts failed than the job may repeat."""
UNFIT_NODES = 12
"""Of the doctor on all nodes: some are not fit for the run."""
START_AGAIN = 200
"""Of a pod: the run stopped or failed and may start again. Above 128, which PyTorchJob's policy ExitCode takes as that."""
DETERMINISTIC = (USER_ERROR, DIVERGED)
"""Codes after which the same start would end alike, so that no job is queued again."""
FINAL = (*DETERMINISTIC, NO_PROGRESS, TOO_MANY_FAILURES)
"""Codes of a job after which nothing may start it again."""
