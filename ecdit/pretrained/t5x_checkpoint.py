"""Reads T5's encoder from a checkpoint of T5X as tensors with the names and axes of transformers' files.

`checkpoint_<step>/checkpoint` is msgpack. It holds small arrays, and specifications of tensorstore arrays for large
ones, which are folders beside it. A checkpoint has no config, so sizes come from the shapes.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ecdit.pretrained.config_json import CONFIG, WeightsError
from ecdit.pretrained.layers import Dtype
from ecdit.pretrained.t5_encoder import T5Config

FILE = "checkpoint"
# From T5X's names to transformers'; `kernel` and relpos_bias are transposed there.
NAMES = (
    (r"^token_embedder\.embedding$", "shared.weight"),
    (r"^encoder\.encoder_norm\.scale$", "encoder.final_layer_norm.weight"),
    (
        r"^encoder\.relpos_bias\.rel_embedding$",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (r"^encoder\.layers_(\d+)\.pre_attention_layer_norm\.scale$", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"^encoder\.layers_(\d+)\.pre_mlp_layer_norm\.scale$", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (r"^encoder\.layers_(\d+)\.mlp\.(wi|wi_0|wi_1|wo)\.kernel$", r"encoder.block.\1.layer.1.DenseReluDense.\2.weight"),
    (r"^encoder\.layers_(\d+)\.attention\.query\.kernel$", r"encoder.block.\1.layer.0.SelfAttention.q.weight"),
    (r"^encoder\.layers_(\d+)\.attention\.key\.kernel$", r"encoder.block.\1.layer.0.SelfAttention.k.weight"),
    (r"^encoder\.layers_(\d+)\.attention\.value\.kernel$", r"encoder.block.\1.layer.0.SelfAttention.v.weight"),
    (r"^encoder\.layers_(\d+)\.attention\.out\.kernel$", r"encoder.block.\1.layer.0.SelfAttention.o.weight"),
)
TRANSPOSED = (".kernel", ".rel_embedding")


def is_t5x(folder: Path) -> bool:
    """Returns whether a folder is a checkpoint of T5X, which has no config.json."""
    return (folder / FILE).is_file() and not (folder / CONFIG).is_file()


class T5xCheckpoint:
    """Reads tensors by transformers' names, or by T5X's names for the decoder. Reads large arrays slice by slice.

    Raises:
      WeightsError: the folder is no checkpoint of T5X, or an array is missing (on construction).
    """

    def __init__(self, folder: Path):
        from flax.serialization import msgpack_restore

        self.folder = Path(folder)
        try:
            tree: Any = msgpack_restore((self.folder / FILE).read_bytes())
            leaves = list(_leaves(tree["optimizer"]["target"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{self.folder / FILE} is no checkpoint of T5X: {error!r}") from None
        self._arrays: dict[str, Any] = {}
        self._transposed: set[str] = set()
        for name, leaf in leaves:
            present = _transformers_name(name)
            self._arrays[present] = leaf if isinstance(leaf, np.ndarray) else self._open(name, leaf)
            if present != name and name.endswith(TRANSPOSED):
                self._transposed.add(present)

    def __str__(self) -> str:
        return str(self.folder)

    def _open(self, name: str, spec: Mapping[str, Any]) -> Any:
        """Opens a tensorstore array by the last part of its path, because the checkpoint may have been moved."""
        import tensorstore

        try:
            path = Path(str(spec["kvstore"]["path"]).rstrip("/")).name
        except (KeyError, TypeError) as error:
            raise WeightsError(f"{self.folder / FILE}: {name} names no array: {error!r}") from None
        kvstore = {"driver": "file", "path": str(self.folder / path)}
        try:
            return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True, open=True).result()
        except (ValueError, OSError) as error:
            raise WeightsError(f"{self.folder / path}: the array of {name} cannot be read: {error}") from None

    def names(self) -> list[str]:
        """Returns the names of all tensors, sorted."""
        return sorted(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        shape = tuple(self._arrays[name].shape)
        return shape[::-1] if name in self._transposed else shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of a tensor."""
        dtype = self._arrays[name].dtype
        return np.dtype(getattr(dtype, "numpy_dtype", dtype))

    def chunk(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a chunk, which zarr reads and decompresses whole."""
        array = self._arrays[name]
        if isinstance(array, np.ndarray):
            return self.shape(name)
        shape = tuple(array.chunk_layout.read_chunk.shape)
        return shape[::-1] if name in self._transposed else shape

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a slice of a tensor."""
        transposed = name in self._transposed
        part = self._arrays[name][index[::-1] if transposed else index]
        values = part if isinstance(part, np.ndarray) else part.read().result()
        return values.T if transposed else values

    def config(self, dtype: Dtype, max_distance: int = 128) -> T5Config:
        """Returns the encoder's config. No shape shows `max_distance`, which is 128 in all published networks.

        Raises:
          WeightsError: an array whose shape shows a size is missing.
        """
        bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        q = "encoder.block.0.layer.0.SelfAttention.q.weight"
        gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in self._arrays
        wi = f"encoder.block.0.layer.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"
        missing = [name for name in ("shared.weight", bias, q, wi) if name not in self._arrays]
        if missing:
            raise WeightsError(f"{self.folder} is no checkpoint of a T5 encoder: it lacks {', '.join(missing)}")
        (vocab_size, width), (buckets, heads) = self.shape("shared.weight"), self.shape(bias)
        layers = {match[1] for match in (re.match(r"encoder\.block\.(\d+)\.", name) for name in self.names()) if match}
        return T5Config(
            vocab_size=vocab_size,
            width=width,
            mlp_width=self.shape(wi)[0],
            layers=len(layers),
            heads=heads,
            head_width=self.shape(q)[0] // heads,
            buckets=buckets,
            max_distance=max_distance,
            mlp="gated-gelu" if gated else "relu",
            epsilon=1e-6,
            dtype=dtype,
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields arrays and specifications of arrays by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, np.ndarray) or (isinstance(value, Mapping) and "kvstore" in value):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")


def _transformers_name(name: str) -> str:
    for pattern, replacement in NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name
