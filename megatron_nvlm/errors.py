"""The one error for mistakes a user can fix: printed as a single sentence, without a traceback."""


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and how to fix it."""
