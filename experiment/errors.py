"""The errors that a script answers with one line."""


class InputError(Exception):
    """What is wrong, where, and what to do about it, in one line. A script prints it and exits with code 2."""


class RunFailed(Exception):
    """What broke while a run was under way, through no fault of its input: a worker or a cluster that went away.

    In one line; a script prints it, says how to go on, and exits with code 1.
    """
