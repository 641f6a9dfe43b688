"""The error of a run that cannot be started as asked."""

from ecdit.errors import UserError


class LaunchError(UserError, ValueError):
    """A run that cannot be started as asked."""
