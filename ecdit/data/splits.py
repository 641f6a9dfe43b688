"""Which split a record belongs to: by a hash of its key, unless its source says so."""

import hashlib

from ecdit.data.config import PrepareConfig


def place_of(key: str) -> float:
    """Returns where a key's hash lies in [0, 1): the same as the data grows, and in every data set with the key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def split_of(key: str, prepare: PrepareConfig) -> str:
    """Returns the split of a key: `held_out` for those whose place is below the share that is held out."""
    return "held_out" if place_of(key) < prepare.held_out else "train"
