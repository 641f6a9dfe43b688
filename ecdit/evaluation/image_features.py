"""Computes features of image files: Inception's for FID, KID, precision and recall, CLIP's for CMMD."""

import concurrent.futures
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image

from ecdit.errors import UserError
from ecdit.evaluation.clip_score import read_image_encoder
from ecdit.evaluation.image_files import read_image
from ecdit.evaluation.preparation import VARIANTS
from ecdit.pretrained.inception import FEATURES, INCEPTION_LAYOUT, Inception, InceptionConfig
from ecdit.pretrained.safetensors_folder import SafetensorsFolder
from ecdit.pretrained.weights import load_folder, tensors_fingerprint
from ecdit.progress import each


class Extractor(NamedTuple):
    """Computes an image's features."""

    name: str  # what decides the features, for results: the network, the preparation and the weights' sha256
    prepare: Callable[[np.ndarray], np.ndarray]  # uint8[h, w, 3] -> an array, of the same shape for each image
    # [B, ...] of prepared images -> [B, D], compiled for each B
    features: Callable[[np.ndarray], Float[np.ndarray, "B D"]]
    dimensions: int = 0  # D, where it is known before an image is read


def inception_extractor(folder: Path, variant: str) -> Extractor:
    """Returns Inception's pool3 on images that are prepared as `variant`, a name of VARIANTS.

    Raises:
      WeightsError: the folder has no whole Inception in safetensors.
    """
    config = InceptionConfig(logits=False, dtype="float32")
    with nnx.use_eager_sharding(False):
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Inception(config, nnx.Rngs(0))), nnx.Param)
    params = load_folder(abstract, INCEPTION_LAYOUT, folder, None).params

    @jax.jit
    def features(params: Any, images: Array) -> Array:
        return nnx.merge(graphdef, nnx.State(params))(images)[0]

    name = f"Inception pool3, {variant}, {_weights(folder)}"
    return Extractor(name, VARIANTS[variant], lambda images: np.asarray(features(params, images)), FEATURES)


def clip_extractor(folder: Path) -> Extractor:
    """Returns CLIP's image embeddings of length 1, of centre squares, as CMMD's authors take them.

    Raises:
      WeightsError: the folder has no whole image encoder of CLIP.
    """
    encoder = read_image_encoder(folder)

    def features(images: np.ndarray) -> Float[np.ndarray, "B D"]:
        embedded = np.asarray(encoder.see(images))
        return embedded / np.linalg.norm(embedded, axis=1, keepdims=True)

    name = f"CLIP's image encoder, centre square of {encoder.image_size} px, {_weights(folder)}"
    return Extractor(name, lambda image: square_bicubic(image, encoder.image_size), features)


def image_features(files: Sequence[Path], extractor: Extractor, batch_size: int) -> Iterator[Float[np.ndarray, "n D"]]:
    """Yields the features of image files in their order, batch by batch. Images are prepared by threads.

    Raises:
      UserError: an image cannot be read, or has features that are not finite; the message names it.
    """
    with concurrent.futures.ThreadPoolExecutor() as threads:
        batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
        waiting: list[list[concurrent.futures.Future]] = []
        pairs = itertools.zip_longest(batches, batches[1:])
        for batch, following in each(pairs, "computing features", "batches", len(batches)):
            # One batch is prepared while the network computes the one before it.
            for some in [batch, following] if not waiting else [following]:
                waiting.append([threads.submit(_prepared, path, extractor.prepare) for path in some or ()])
            prepared = np.stack([future.result() for future in waiting.pop(0)])
            filled = prepared[np.arange(batch_size) % len(prepared)]  # one size of batch is compiled
            found = extractor.features(filled)[: len(batch)]
            wrong = np.flatnonzero(~np.isfinite(found).all(axis=1))
            if len(wrong):
                raise UserError(f"{batch[wrong[0]]}: its features are not finite; {extractor.name}")
            yield found


def square_bicubic(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Returns the centre square of an image, cut out and then resized by Pillow, as CMMD's authors prepare images."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def _weights(folder: Path) -> str:
    """Returns the beginning of the sha256 over a folder's tensors; Inception's has no config.json."""
    return f"sha256 {tensors_fingerprint(SafetensorsFolder(folder), {})[:16]}"


def _prepared(path: Path, prepare: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return prepare(read_image(path))
