"""Defines the base class of errors that a user can fix, and finds the causes of an error."""

from collections.abc import Iterator


class UserError(Exception):
    """An error that the user can fix. Commands print its message without a traceback."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
