"""Assigns records to splits by a hash of their key, unless their source assigns one."""

import hashlib

from ecdit.data.config import PrepareConfig


def place_of(key: str) -> float:
    """Returns a key's hash in [0, 1). It does not change as the data grows, and is the same in every data set."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def split_of(key: str, prepare: PrepareConfig) -> str:
    """Returns the split of a key: `held_out` if its hash is below the held-out share."""
    return "held_out" if place_of(key) < prepare.held_out else "train"
