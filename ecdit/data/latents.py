"""The column of prepared latents: what a public autoencoder's encoder gives of each record's image."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float16, UInt8

from ecdit.data import DataError
from ecdit.data.images import decode_stored
from ecdit.data.programs import Program, compiled
from ecdit.data.record import Record, pack
from ecdit.encoders.autoencoder import to_unit
from ecdit.partitioning import MeshConfig, make_mesh
from ecdit.pretrained.agreement import fingerprint_once
from ecdit.pretrained.autoencoder_kl import AUTOENCODER_LAYOUT, AutoencoderKL, read_autoencoder
from ecdit.pretrained.weights import load_folder

_BATCH = 8  # images of a device at a time

Moments = Callable[[UInt8[np.ndarray, "B H W 3"]], Float16[np.ndarray, "B h w 2c"]]


@dataclasses.dataclass(frozen=True)
class LatentsColumn:
    """The column latents-<name>: float16[h, w, 2c], means and log variances, with the image's size and crop."""

    label: str  # data.latents
    folder: Path  # of the autoencoder
    dtype: Literal["float32", "bfloat16"]
    image_size: int  # px

    @property
    def name(self) -> str:
        """Returns the column's name."""
        return f"latents-{self.label}"

    @property
    def made_by(self) -> str:
        """Returns the sha256 of the weights' fingerprint and the dtype of the computation."""
        return hashlib.sha256(f"{fingerprint_once(self.folder)} {self.dtype}".encode()).hexdigest()

    @property
    def process_bytes(self) -> int:
        """Returns the memory that each process takes on CPUs: its weights, and what XLA plans to compute a batch."""
        return _program(self.folder, self.dtype, self.image_size).process_bytes

    def values(self, records: Iterable[Record]) -> Iterator[tuple[bytes, Mapping[str, int]]]:
        """Yields each record's latents. Uses all devices of this process.

        Raises:
          DataError: an image of another size, or latents that float16 cannot hold.
        """
        size, moments = _BATCH * jax.local_device_count(), _encoder(self.folder, self.dtype, self.image_size)
        rest = iter(records)
        while batch := list(itertools.islice(rest, size)):
            images = np.zeros((size, self.image_size, self.image_size, 3), np.uint8)  # one shape, so one compilation
            for image, record in zip(images, batch, strict=False):
                found = decode_stored(record.image)
                if found.shape != image.shape:
                    raise DataError(f"{record.key}: the image has the shape {found.shape}, not {image.shape}")
                image[:] = found
            for latents, record in zip(moments(images), batch, strict=False):
                if not np.isfinite(latents).all():
                    raise DataError(f"{record.key}: its latents are not finite as {self.folder} encodes it")
                yield pack({"latents": latents, "original_size": record.original_size, "crop": record.crop}), {}


@functools.lru_cache(maxsize=1)
def _program(folder: Path, dtype: Literal["float32", "bfloat16"], image_size: int) -> Program:
    """Returns the compiled function from a batch of images to the moments of their latents. Reads no weights."""
    config = read_autoencoder(folder, "mode", dtype)
    with nnx.use_eager_sharding(False):
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: AutoencoderKL(config, nnx.Rngs(0))), nnx.Param)

    def moments(params: dict, images: jax.Array) -> jax.Array:
        found = nnx.merge(graphdef, nnx.State(params)).moments(to_unit(images))
        return jnp.concatenate(found, axis=-1).astype(jnp.float16)

    images = jax.ShapeDtypeStruct((_BATCH * jax.local_device_count(), image_size, image_size, 3), jnp.uint8)
    return compiled(moments, abstract, images, make_mesh(MeshConfig(1, -1, 1, 1, 1), jax.local_devices()))


@functools.lru_cache(maxsize=1)
def _encoder(folder: Path, dtype: Literal["float32", "bfloat16"], image_size: int) -> Moments:
    """Returns that function with the weights on all devices."""
    program = _program(folder, dtype, image_size)
    params = load_folder(program.abstract, AUTOENCODER_LAYOUT, folder, program.mesh).params
    return lambda images: np.asarray(program.run(params, images))
