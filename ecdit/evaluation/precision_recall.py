"""Precision and recall of generated features: how many lie among the real ones, and how many of those they reach.

Kynkaanniemi et al.: Improved precision and recall metric for assessing generative models (arXiv 1904.06991). The set of
real features is taken to be where the balls around its members are that reach to their third nearest neighbours.
"""

import numpy as np
from jaxtyping import Float

from ecdit.errors import UserError

NEIGHBOURS = 3
CHUNK = 1024  # rows of a distance matrix that are computed at once


def precision_recall(
    generated: Float[np.ndarray, "N D"], real: Float[np.ndarray, "M D"], neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Returns (precision, recall): the shares of generated features in a ball of a real one, and vice versa.

    A feature at the radius itself is inside. Distances are Euclidean, in float64.

    Raises:
      UserError: a set has no more than `neighbours` rows, or the dimensions differ.
    """
    if generated.shape[1] != real.shape[1]:
        dimensions = f"{generated.shape[1]} and {real.shape[1]}"
        raise UserError(f"features have {dimensions} dimensions; they must be of the same network")
    for name, features in (("generated", generated), ("real", real)):
        if not 1 <= neighbours < len(features):
            raise UserError(f"neighbours = {neighbours}: must be from 1 to {len(features) - 1} for {name} features")
    generated, real = generated.astype(np.float64), real.astype(np.float64)
    precision = _share_inside(generated, real, squared_radii(real, neighbours))
    return precision, _share_inside(real, generated, squared_radii(generated, neighbours))


def squared_radii(features: Float[np.ndarray, "N D"], neighbours: int) -> Float[np.ndarray, " N"]:
    """Returns the squared distance of each row to its nearest neighbour number `neighbours`, itself not counted."""
    radii = []
    for start in range(0, len(features), CHUNK):
        distances = _squared_distances(features[start : start + CHUNK], features)
        radii.append(np.partition(distances, neighbours, axis=1)[:, neighbours])  # number 0 is the row itself
    return np.concatenate(radii)


def _share_inside(
    points: Float[np.ndarray, "N D"], centres: Float[np.ndarray, "M D"], radii: Float[np.ndarray, " M"]
) -> float:
    inside = 0
    for start in range(0, len(points), CHUNK):
        distances = _squared_distances(points[start : start + CHUNK], centres)
        inside += int((distances <= radii[None]).any(axis=1).sum())
    return inside / len(points)


def _squared_distances(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "n M"]:
    """Returns |x - y|^2 of all pairs, with 0 up to rounding made 0: balls around repeated rows have radius 0."""
    sums = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)[None]
    distances = sums - 2 * x @ y.T
    distances[distances < 1e-13 * sums] = 0
    return distances
