"""Damages checkpoints as disks do."""

import numpy as np
import tensorstore


def flip(path, bit):
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def flip_array(directory, name="params.denoiser.head"):
    """One bit of an array of float32, in a way that the reading library does not notice."""
    where = f"{directory}/state/"
    base = where if where.startswith("gs://") else {"driver": "file", "path": where}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    values = np.array(array.read().result())
    values.reshape(-1).view(np.uint32)[values.size // 2] ^= 1 << 3
    array.write(values).result()


def flip_meta(directory):
    """One bit of the JSON's data position."""
    path = directory / "meta" / "metadata"
    flip(path, 8 * path.read_bytes().index(b"next_row") + 96)
