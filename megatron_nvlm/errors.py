"""The one error for mistakes a user can mend: printed as a single sentence, without a traceback."""


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and how to mend it."""
