"""Defines the error of a run that cannot be launched."""

from ecdit.errors import UserError


class LaunchError(UserError, ValueError):
    """A run cannot be launched with the given flags and config."""
