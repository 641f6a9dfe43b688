"""Mean and covariance of features in float64, from shards, and the npz files with `mu` and `sigma` that hold them."""

import dataclasses
import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ecdit.errors import UserError
from ecdit.files import replace_bytes

# Rows that are taken at once: 64 MB in float64 for 2048 dimensions.
BLOCK = 4096
LARGEST = 1e50  # of a feature: KID takes sixth powers, which overflow in float64 from about there on


@dataclasses.dataclass(frozen=True)
class Moments:
    """The moments of a set of features for the Fréchet distance. A file need not state the last two."""

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]  # divided by count - 1, as np.cov does
    count: int | None = None
    extractor: str | None = None


def moments(shards: Iterable[Float[np.ndarray, "n D"]]) -> Moments:
    """Returns the moments of all rows of the shards, of any real dtype, in float64.

    Rows are regrouped into blocks of BLOCK, so the result is the same to the last bit however they are split. They are
    shifted by the first block's mean, because sums of squares would lose the digits of a spread that is small beside
    the mean.

    Raises:
      UserError: there are fewer than two rows, a shard is no matrix or has other dimensions, or a value is not finite.
    """
    count, shift, total, products = 0, np.zeros(0), np.zeros(0), np.zeros((0, 0))
    for block in blocks(shards, BLOCK):
        if count == 0:
            shift = block.mean(axis=0)
            total, products = np.zeros_like(shift), np.zeros((len(shift), len(shift)))
        block -= shift[None]
        total += block.sum(axis=0)
        products += block.T @ block
        count += len(block)
    if count < 2:
        raise UserError(f"features: {count} rows; a covariance needs 2 or more")
    offset = total / count
    products -= count * np.outer(offset, offset)
    products /= count - 1
    return Moments(shift + offset, products, count)


def blocks(shards: Iterable[Float[np.ndarray, "n D"]], size: int) -> Iterator[Float[np.ndarray, "m D"]]:
    """Yields the shards' rows in order, as new float64 arrays of `size` rows; the last one is shorter.

    Raises:
      UserError: a shard is no matrix of real numbers, has other dimensions, or a value is not finite or above LARGEST.
    """
    pending: list[np.ndarray] = []
    row = dimensions = 0
    for shard in shards:
        if shard.ndim != 2 or not shard.shape[1] or dimensions not in (0, shard.shape[1]):
            wanted = f"[rows, {dimensions or 'D'}]"
            raise UserError(f"features of shape {list(shard.shape)}: must be a matrix {wanted}")
        if shard.dtype.kind not in "fiu":
            raise UserError(f"features of dtype {shard.dtype}: must be real numbers")
        dimensions, start = shard.shape[1], 0
        while start < len(shard):
            part = shard[start : start + size - sum(map(len, pending))].astype(np.float64)
            _check_finite(part, row)
            pending.append(part)
            start, row = start + len(part), row + len(part)
            if sum(map(len, pending)) == size:
                yield _joined(pending)
                pending = []
    if pending:
        yield _joined(pending)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check_finite(part: Float[np.ndarray, "m D"], first_row: int) -> None:
    usable = np.abs(part) <= LARGEST  # false for NaN
    if not usable.all():
        row, column = np.argwhere(~usable)[0]
        allowed = f"must be finite, at most {LARGEST:g}"
        raise UserError(f"features[{first_row + row}, {column}] = {part[row, column]}: {allowed}")


def read_moments(path: Path) -> Moments:
    """Returns the moments in an npz file with `mu` and `sigma`, as pytorch-fid writes it, or with all, as ours.

    Raises:
      UserError: it is no such file, or its arrays have the wrong shape, are not finite or not symmetric.
    """
    found = _read_arrays(path, ("mu", "sigma", "count", "extractor"))
    for key in ("mu", "sigma"):
        if key not in found:
            raise UserError(f"{path}: {key} is missing; there is {', '.join(found) or 'nothing'}")
        if found[key].dtype.kind not in "fiu":
            raise UserError(f"{path}: {key} has dtype {found[key].dtype}; it must be real numbers")
    mean, covariance = (found[key].astype(np.float64) for key in ("mu", "sigma"))
    if mean.ndim != 1 or not mean.size or covariance.shape != (len(mean), len(mean)):
        shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise UserError(f"{path}: mu and sigma have shapes {shapes}; they must be [D] and [D, D]")
    if not ((np.abs(mean) <= LARGEST).all() and (np.abs(covariance) <= LARGEST**2).all()):
        raise UserError(f"{path}: mu and sigma must be finite, at most {LARGEST:g} and {LARGEST**2:g}")
    if not np.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-8 * np.abs(covariance).max(initial=0)):
        raise UserError(f"{path}: sigma is not symmetric; it must be a covariance")
    if np.diagonal(covariance).min() < 0:
        raise UserError(f"{path}: sigma has a variance below 0; it must be a covariance")
    count, extractor = found.get("count"), found.get("extractor")
    if count is not None and (count.shape or count.dtype.kind not in "iu" or count < 2):
        raise UserError(f"{path}: count = {count}: must be a whole number, 2 or more")
    symmetric = (covariance + covariance.T) / 2
    return Moments(
        mean, symmetric, None if count is None else int(count), None if extractor is None else str(extractor)
    )


def _read_arrays(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns those of the arrays that are there; others are not read, as some files have all images in them."""
    with path.open("rb") as stream:  # opened here, as np.load leaves a damaged file open
        try:
            file = np.load(stream, allow_pickle=False)
            return {key: file[key] for key in keys if key in file.files}
        except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is no npz file with mu and sigma: {error}") from None


def write_moments(path: Path, values: Moments) -> None:
    """Writes an npz file that pytorch-fid reads too, whole or not at all."""
    buffer = io.BytesIO()
    stated = {"count": values.count, "extractor": values.extractor}
    extra: dict[str, Any] = {name: value for name, value in stated.items() if value is not None}
    np.savez(buffer, mu=values.mean, sigma=values.covariance, **extra)
    replace_bytes(path, buffer.getvalue())
