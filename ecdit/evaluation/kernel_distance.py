"""Maximum mean discrepancies of two sets of features: KID of Inception's, CMMD of CLIP's."""

import numpy as np
from jaxtyping import Float

from ecdit.errors import UserError

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
CHUNK = 2048  # rows of a kernel matrix that are computed at once


def kernel_inception_distance(
    features_a: Float[np.ndarray, "N D"],
    features_b: Float[np.ndarray, "M D"],
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns KID: mean and standard deviation of the unbiased squared discrepancy of random subsets.

    It can be negative.

    Binkowski et al.: Demystifying MMD GANs (arXiv 1801.01401). The kernel is (x . y / D + 1)^3. Each subset takes
    `subset_size` rows of each set without replacement; the choice depends on `seed` alone, and is not that of other
    implementations.

    Raises:
      UserError: a set has fewer rows than a subset, a subset fewer than two, or the dimensions differ.
    """
    _check_dimensions(features_a, features_b)
    fewest = min(len(features_a), len(features_b))
    if not 2 <= subset_size <= fewest:
        raise UserError(f"subset_size = {subset_size}: must be from 2 to {fewest}, the rows of the smaller set")
    if subsets < 1:
        raise UserError(f"subsets = {subsets}: must be 1 or more")
    random = np.random.Generator(np.random.Philox(seed))
    found = []
    for _ in range(subsets):
        a = features_a[random.permutation(len(features_a))[:subset_size]].astype(np.float64)
        b = features_b[random.permutation(len(features_b))[:subset_size]].astype(np.float64)
        found.append(unbiased_discrepancy(a, b))
    return float(np.mean(found)), float(np.std(found))


def unbiased_discrepancy(a: Float[np.ndarray, "n D"], b: Float[np.ndarray, "n D"]) -> float:
    """Returns the squared discrepancy under KID's kernel, unbiased because no row is compared with itself."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_without_diagonal(x: np.ndarray) -> float:
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return float(mean_without_diagonal(a) + mean_without_diagonal(b) - 2 * kernel(a, b).mean())


def clip_discrepancy(features_a: Float[np.ndarray, "N D"], features_b: Float[np.ndarray, "M D"]) -> float:
    """Returns CMMD: 1000 times the squared discrepancy under a Gaussian kernel of sigma 10.

    Rows are compared with themselves too.

    Jayasumana et al.: Rethinking FID (arXiv 2401.09603). It is defined for CLIP ViT-L/14-336 embeddings of length 1.

    Raises:
      UserError: the dimensions differ.
    """
    _check_dimensions(features_a, features_b)
    a, b = features_a.astype(np.float64), features_b.astype(np.float64)
    return CMMD_SCALE * (_gaussian_mean(a, a) + _gaussian_mean(b, b) - 2 * _gaussian_mean(a, b))


def _gaussian_mean(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """Returns the mean of exp(-|x - y|^2 / (2 sigma^2)) over all pairs."""
    squares = np.square(y).sum(axis=1)
    total = 0.0
    for start in range(0, len(x), CHUNK):
        rows = x[start : start + CHUNK]
        distances = np.square(rows).sum(axis=1)[:, None] + squares[None] - 2 * rows @ y.T
        total += np.exp(-distances / (2 * CMMD_SIGMA**2)).sum()
    return float(total / (len(x) * len(y)))


def _check_dimensions(features_a: np.ndarray, features_b: np.ndarray) -> None:
    if features_a.shape[1] != features_b.shape[1]:
        dimensions = f"{features_a.shape[1]} and {features_b.shape[1]}"
        raise UserError(f"features have {dimensions} dimensions; they must be of the same network")
