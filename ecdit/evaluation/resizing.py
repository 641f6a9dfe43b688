"""Linear maps that resize images as other libraries do, where Pillow has no such filter.

Each is a matrix [size after, size before] of one axis, so that resizing is two products, and several steps in a row are
the product of their matrices.
"""

import numpy as np
from jaxtyping import Float, Float64


def bilinear(before: int, after: int) -> Float64[np.ndarray, "after before"]:
    """Returns bilinear interpolation between pixels' centres, without antialiasing.

    It is PyTorch's interpolate(mode="bilinear", align_corners=False), and OpenCV's INTER_LINEAR without its rounding.
    """
    return _two_taps((np.arange(after) + 0.5) * before / after - 0.5, before)


def tensorflow_bilinear(before: int, after: int) -> Float64[np.ndarray, "after before"]:
    """Returns bilinear interpolation of TensorFlow 1, which takes pixels for points: new pixel i is old i x scale."""
    return _two_taps(np.arange(after) * before / after, before)


def _two_taps(positions: np.ndarray, before: int) -> np.ndarray:
    """Returns the weights of the two pixels next to each position; beyond the border is the pixel at the border."""
    positions = np.clip(positions, 0, before - 1)
    first = np.floor(positions).astype(int)
    second = np.minimum(first + 1, before - 1)
    share, rows = positions - first, np.arange(len(positions))
    weights = np.zeros((len(positions), before))
    weights[rows, first] = 1 - share
    weights[rows, second] += share
    return weights


def resized(
    image: Float[np.ndarray, "h w c"],
    rows: Float[np.ndarray, "H h"],
    columns: Float[np.ndarray, "W w"],
) -> Float[np.ndarray, "H W c"]:
    """Returns an image with both axes mapped, in the wider dtype."""
    across = np.einsum("hwc,Ww->hWc", image, columns, optimize=True)
    return np.einsum("hWc,Hh->HWc", across, rows, optimize=True)
