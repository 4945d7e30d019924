"""The one exception that is the user's to mend."""


class UserError(Exception):
    """Its message is one line: what is wrong, where, and what to do. Shown without a traceback."""
