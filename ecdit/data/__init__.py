"""Images with captions: prepared once into ArrayRecord, read by global row while training."""

from ecdit.errors import UserError


class DataError(UserError):
    """The data, or what the config says about it, cannot be used: the message says what to do."""
