"""The errors for what a user can fix: each printed as a single sentence, without a traceback."""

from megatron_nvlm.exit_codes import DIVERGED, USER_ERROR


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and how to fix it."""

    exit_code = USER_ERROR


class DivergedError(UserError):
    """Training has gone wrong: something that must be finite is not."""

    exit_code = DIVERGED
