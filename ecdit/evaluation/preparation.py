"""Prepares images for Inception, each variant as one package does whose name it has.

    variant         package               resize to 299                              normalise
    clean-fid       clean-fid 0.1.35      bicubic, antialiased, clipped to 0..255    (x - 128) / 128
    pytorch-fid     pytorch-fid 0.3.0     bilinear, no antialias                     2 x / 255 - 1
    torch-fidelity  torch-fidelity 0.4.0  bilinear of TensorFlow 1, no antialias     (x - 128) / 128
    torchmetrics    torchmetrics 1.9      bilinear, antialiased                      (x - 128) / 128

No variant rounds after resizing. FIDs of two variants do not compare.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from ecdit.evaluation.resizing import bilinear, resized, tensorflow_bilinear

SIZE = 299  # Inception's
Pixels = UInt8[np.ndarray, "h w 3"]
Prepared = Float32[np.ndarray, "299 299 3"]


def _around_zero(image: np.ndarray) -> np.ndarray:
    return (image - 128) / 128


def _pillow(image: np.ndarray, filter: Image.Resampling) -> np.ndarray:
    """Resizes each channel in floating point; Pillow widens its filters where they make an image smaller."""
    channels = (Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(image, 2, 0))
    return np.stack([np.asarray(channel.resize((SIZE, SIZE), filter)) for channel in channels], axis=2)


def _matrices(image: np.ndarray, axis: Callable[[int, int], np.ndarray]) -> np.ndarray:
    maps = (axis(side, SIZE).astype(np.float32) for side in image.shape[:2])
    return resized(image.astype(np.float32), *maps)


def clean_fid(image: Pixels) -> Prepared:
    """Returns an image as clean-fid's mode "clean" prepares it."""
    return _around_zero(np.clip(_pillow(image, Image.Resampling.BICUBIC), 0, 255))


def pytorch_fid(image: Pixels) -> Prepared:
    """Returns an image as pytorch-fid prepares it."""
    return _matrices(image, bilinear) / np.float32(127.5) - 1


def torch_fidelity(image: Pixels) -> Prepared:
    """Returns an image as torch-fidelity prepares it."""
    return _around_zero(_matrices(image, tensorflow_bilinear))


def torchmetrics(image: Pixels) -> Prepared:
    """Returns an image as torchmetrics prepares it, whose default antialiases since 1.8."""
    return _around_zero(_pillow(image, Image.Resampling.BILINEAR))


VARIANTS: dict[str, Callable[[Pixels], Prepared]] = {
    "clean-fid": clean_fid,
    "pytorch-fid": pytorch_fid,
    "torch-fidelity": torch_fidelity,
    "torchmetrics": torchmetrics,
}
