"""Defines the base class of errors that a user can fix and the class of outages, and finds the causes of an error."""

from collections.abc import Iterator


class UserError(Exception):
    """An error that the user can fix. Commands print its message without a traceback."""


class OutageError(UserError):
    """A bucket or the network could not be reached, by this process or by another one. A restart may succeed."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, and those that it was raised from or while they were handled."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that it was raised from. A bug met while another error is handled has no cause."""
    while error is not None:
        yield error
        error = error.__cause__
