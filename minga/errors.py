"""The one exception for mistakes that are the user's to mend."""

_LONGEST = 900  # characters; a file from a stranger may hold a name of any length


class UserError(ValueError):
    """What is wrong, where, and what to do, in one line: `what is wrong (where). what to do`.

    The command line prints it as `error: ...` and exits with 2; any other exception is ours and keeps its traceback.
    Names and values in the line may come from hostile files: what no terminal should be sent is escaped as in a Python
    string, and of a line that is too long the middle is left out.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(_shortened(message).splitlines())
        super().__init__(_shortened("".join(c if c.isprintable() else repr(c)[1:-1] for c in line)))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST * 2 // 3]} [...] {text[-_LONGEST // 3 :]}"
