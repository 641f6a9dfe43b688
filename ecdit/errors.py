"""The error that a user can mend, whose subclasses stand beside the code that raises them; and what led to an error."""

from collections.abc import Iterator


class UserError(Exception):
    """Something the user can mend: commands print its message without a traceback."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
