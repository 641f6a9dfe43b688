"""The Fréchet distance of two sets of features, which FID is of Inception's.

Heusel et al.: GANs trained by a two time-scale update rule (arXiv 1706.08500). The formula is that of
calculate_frechet_distance in github.com/mseitzer/pytorch-fid at commit b9c1811 (0.3.0):

    |mean_a - mean_b|^2 + tr A + tr B - 2 tr sqrt(A B)        A, B the covariances

sqrt(A B) need not be symmetric, and its computation (scipy.linalg.sqrtm) is slow, can fail for singular A B, and gives
imaginary parts to drop. But X Y and Y X have the same eigenvalues other than 0. So with any R for which R R^T = B,
those of A B are those of R^T A R, which is symmetric and positive, as those of sqrt(B) A sqrt(B) are; and the trace of
the root is the sum of their roots. R is a Cholesky factor, the fastest one.

A covariance of fewer samples than dimensions is singular. There an eigenvalue that should be 0 is 1e-16 by rounding,
and its root 1e-8, for each empty dimension. So such dimensions are taken out of A and B before the product is made.

Where sqrtm fails, pytorch-fid adds 1e-6 to both diagonals, which changes the result; nothing fails here.
"""

import numpy as np
from jaxtyping import Float

from ecdit.errors import UserError
from ecdit.evaluation.moments import Moments, moments


def frechet_distance(features_a: Float[np.ndarray, "N D"], features_b: Float[np.ndarray, "M D"]) -> float:
    """Returns the squared Fréchet distance of the normal distributions that fit two sets of features; rows are samples.

    It is biased: fewer samples give a larger distance, so only equal numbers compare.

    Raises:
      UserError: a set has fewer than two rows or a value that is not finite, or the dimensions differ.
    """
    return distance_of_moments(moments([features_a]), moments([features_b]))


def distance_of_moments(a: Moments, b: Moments) -> float:
    """Returns the squared Fréchet distance of two normal distributions.

    Raises:
      UserError: the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features have {len(a.mean)} and {len(b.mean)} dimensions; they must be of the same network")
    offset = a.mean - b.mean
    root_product = _trace_of_root(a.covariance, b.covariance)
    total = offset @ offset + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_product
    return max(float(total), 0.0)  # below 0 only by rounding


def _trace_of_root(a: Float[np.ndarray, "D D"], b: Float[np.ndarray, "D D"]) -> float:
    """Returns tr sqrt(A B), the sum of the roots of the eigenvalues of A B."""
    factor_a, factor = (_cholesky(covariance, _rounding(covariance)) for covariance in (a, b))
    if factor is not None and factor_a is not None:
        product = factor.T @ a @ factor
    elif factor_a is not None:
        product = _product_in_range(b, a)
    else:
        product = _product_in_range(a, b)
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh(product), 0)).sum())


def _product_in_range(a: Float[np.ndarray, "D D"], b: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "r r"]:
    """Returns a positive definite matrix with the eigenvalues of A B other than 0, where A is singular.

    With the axes U in which A is not empty, A = U diag(values) U^T. The matrix U^T B U = R R^T can have empty axes of
    its own, which R leaves out; then R^T diag(values) R has none.
    """
    values, axes = _spectrum(a, _rounding(a))
    seen, rounding = axes.T @ b @ axes, _rounding(b)
    root = _cholesky(seen, rounding)
    if root is None:
        seen_values, seen_axes = _spectrum(seen, rounding)
        root = seen_axes * np.sqrt(seen_values)[None]
    return root.T @ (values[:, None] * root)


def _cholesky(matrix: Float[np.ndarray, "n n"], rounding: float) -> Float[np.ndarray, "n n"] | None:
    """Returns the lower factor L with L L^T = matrix, or None if the matrix is singular up to `rounding`."""
    try:
        factor = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None
    return factor if np.square(np.diagonal(factor)).min(initial=np.inf) > rounding else None


def _spectrum(
    matrix: Float[np.ndarray, "n n"], rounding: float
) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, "n r"]]:
    """Returns the eigenvalues above `rounding` and their vectors."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > rounding
    return values[kept], vectors[:, kept]


def _rounding(matrix: Float[np.ndarray, "D D"]) -> float:
    """Returns the size up to which an eigenvalue may be rounding: sqrt(D) to D times the largest one's error."""
    return float(np.finfo(np.float64).eps * np.sqrt(len(matrix)) * np.linalg.norm(matrix))
