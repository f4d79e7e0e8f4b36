"""The errors of this package that are meant to be read by the person at the keyboard."""


class UserError(Exception):
    """An error that the user can mend, in one line: what is wrong, and what to do about it.

    The command line prints the message on stderr and exits with `exit_status`, without a traceback.
    """

    exit_status = 2


class BrokenFoldError(UserError):
    """A fold whose numbers are not finite although its input was valid."""

    exit_status = 1
