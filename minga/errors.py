"""The one exception for mistakes that are the user's to mend."""


class UserError(ValueError):
    """What is wrong, where, and what to do, in one line: `what is wrong (where). what to do`.

    The command line prints it as `error: ...` and exits with 2; any other exception is ours and keeps its traceback.
    """
