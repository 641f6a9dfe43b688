"""Reads features from .npy files, in shards or not; rows are samples."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

from ecdit.errors import UserError
from ecdit.evaluation.moments import BLOCK, Moments, blocks, moments, read_moments


def shard_paths(text: str, name: str) -> list[Path]:
    """Returns the .npy files that `text` names: paths separated by commas, or directories of them, sorted by name.

    Raises:
      UserError: there is none, or one is no .npy file; `name` is what the message calls `text`.
    """
    paths = []
    for part in map(Path, text.split(",")):
        found = sorted(part.glob("*.npy")) if part.is_dir() else [part]
        if not found or any(path.suffix != ".npy" or not path.is_file() for path in found):
            raise UserError(f"{name}={text}: {part} is or has no .npy file of features")
        paths += found
    return paths


def read_shards(paths: list[Path]) -> Iterator[Float[np.ndarray, "n D"]]:
    """Yields the array of each file, mapped and not read into memory.

    Raises:
      UserError: a file is damaged, or holds no array of numbers, or no rows.
    """
    for path in paths:
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"{path} is no .npy file of numbers: {error}") from None
        if not found.shape or not len(found):
            raise UserError(f"{path} has no rows")
        yield found


def read_features(text: str, name: str) -> Float[np.ndarray, "N D"]:
    """Returns all features that `text` names (see `shard_paths`), in float64.

    Raises:
      UserError: there are none, or a value is not finite.
    """
    paths = shard_paths(text, name)
    try:
        found = list(blocks(read_shards(paths), BLOCK))
    except UserError as error:
        raise UserError(f"{name}={text}: {error}") from error
    if not found:
        raise UserError(f"{name}={text}: has no rows")
    return np.concatenate(found)


def read_moments_or_features(text: str, name: str) -> Moments:
    """Returns the moments in an .npz file, or those of the features that `text` names (see `shard_paths`).

    Raises:
      UserError: there are none, or a value is not finite.
    """
    if text.endswith(".npz"):
        return read_moments(Path(text))
    paths = shard_paths(text, name)
    try:
        return moments(read_shards(paths))
    except UserError as error:
        raise UserError(f"{name}={text}: {error}") from error
