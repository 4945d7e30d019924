"""The exception for mistakes that the user can correct, and other errors in one line."""


class UserError(Exception):
    """A mistake that the user can correct, shown without a traceback.

    The message is one line: what is wrong, where, and what to do.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's class if it has none.

    A line that ends in a colon is followed by the next one.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
