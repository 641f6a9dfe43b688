"""The error that a user can mend; subclasses stand beside the code that raises them."""


class UserError(Exception):
    """Something the user can mend: commands print its message without a traceback."""
