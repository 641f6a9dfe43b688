"""Prepares images with captions once as ArrayRecord, and reads them by global row during training."""

from ecdit.errors import UserError


class DataError(UserError):
    """The data or its config cannot be used; the message says what to do."""
