"""The exception for mistakes that the user can correct, and other errors in one line."""


class UserError(Exception):
    """A mistake that the user can correct, shown without a traceback.

    The message is one line: what is wrong, where, and what to do.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's class if it has none.

    A line that ends in a colon is followed by the next one.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # What OmegaConf puts before the message of an error in a resolver.
    return line.removeprefix("UserError raised while resolving interpolation: ")
