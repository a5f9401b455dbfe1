"""The one error that a user can mend."""


class InputError(Exception):
    """What is wrong, where, and what to do about it, in one line. A script prints it and exits with code 2."""
