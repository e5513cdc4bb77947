"""The one exception that commands show to a person as a line of text."""


class UserError(Exception):
    """Something the user can mend: says what was given, what was expected and what to do.

    Commands print the message without a traceback and exit with code 2.
    """
