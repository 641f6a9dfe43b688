"""Counts records that share their image or their captions with others, by hashes that preparation keeps of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_COUNTED_RECORDS = 1 << 26  # records whose hashes fit in half a GB; beyond that, a share is counted


class Copies(NamedTuple):
    """Counts of records that others equal."""

    images: int  # records that share their image
    captions: int  # records that share their captions
    held_out_in_train: int  # held-out records whose image training reads
    counted: float  # share of the records from which these were scaled up


def count_copies(parts: Sequence[tuple[Path, int]]) -> Copies:
    """Counts copies by the file of each part's hashes, of which the first so many are of records for training.

    Above `_COUNTED_RECORDS` it counts only the lowest hashes, which either have all copies of a record or none.
    """
    total = sum(np.load(path, mmap_mode="r").shape[0] for path, _ in parts)
    share = min(1.0, _COUNTED_RECORDS / max(total, 1))
    limit = np.uint64(min(int(share * 2**64), 2**64 - 1))

    def kept(hashes: np.ndarray) -> np.ndarray:
        return hashes[hashes <= limit]

    def scaled(count: np.integer) -> int:
        return round(int(count) / share)

    def counted(column: int) -> tuple[int, int]:
        """Returns how many records share a hash with another one, and how many held-out ones with one for training."""
        loaded = ((np.load(path)[:, column], trained) for path, trained in parts)
        found = [(kept(rows[:trained]), kept(rows[trained:])) for rows, trained in loaded]
        train, held_out = (np.concatenate(each) for each in zip(*found, strict=True))
        _, counts = np.unique(np.concatenate([train, held_out]), return_counts=True)
        return scaled(counts[counts > 1].sum()), scaled(np.isin(held_out, train).sum())

    images, held_out_in_train = counted(0)
    captions, _ = counted(1)
    return Copies(images, captions, held_out_in_train, share)
