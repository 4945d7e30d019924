"""The one exception that is the user's to mend, and others in one line."""


class UserError(Exception):
    """Its message is one line: what is wrong, where, and what to do. Shown without a traceback."""


def first_line(error: BaseException) -> str:
    """The start of another library's message, fit for one line of ours."""
    return str(error).strip().partition("\n")[0].rstrip() or type(error).__name__
