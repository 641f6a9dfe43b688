"""Fills a network's parameters from tensors in files. Each process reads only the slices that its devices hold."""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ecdit.partitioning import param_shardings
from ecdit.pretrained.config_json import CONFIG, WeightsError, read_json
from ecdit.pretrained.layout import Layout, tensor_axes
from ecdit.pretrained.safetensors_folder import SafetensorsFolder
from ecdit.pretrained.slice_sums import slice_sum
from ecdit.pretrained.t5x_checkpoint import T5xCheckpoint, is_t5x

PIECE_BYTES = 4 * 2**20  # bytes per read: much less than a tensor, much more than a disk's block
SHOWN = 10  # names of each kind shown in an error
FLOATS = ("float64", "float32", "float16", "bfloat16")


class Tensors(Protocol):
    """Reads tensors from files; `str` returns their path."""

    def names(self) -> list[str]:
        """Returns the names of all tensors, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of a tensor."""
        ...

    def chunk(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the parts of a tensor that are read whole: a row, or a chunk of zarr."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a slice of a tensor."""
        ...


Bounds = tuple[tuple[int, int], ...]  # the first place of a slice and the one behind its last, by the tensor's axes


class Slice(NamedTuple):
    """A slice of a tensor that this process has read."""

    sum: int  # `slice_sum` of its bits
    devices: int  # of this process that hold it


class Loaded(NamedTuple):
    """A network's parameters."""

    params: dict[str, Any]  # nested, as nnx.State accepts it
    not_numbers: dict[str, int]  # NaNs and infinities that this process read, by tensor, without zeros
    slices: dict[str, dict[Bounds, Slice]]  # that this process read, by tensor; empty without sums


class _Parameter(NamedTuple):
    """A parameter and its tensors: one, or one per layer if its first axis stacks layers."""

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: Any
    tensors: tuple[str, ...]
    stacked: bool

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    @property
    def axes(self) -> tuple[int, ...]:
        """Returns the tensor's axis for each axis of the parameter."""
        return tensor_axes(self.path, len(self.layer_shape))

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return tuple(self.layer_shape[self.axes.index(axis)] for axis in range(len(self.axes)))


class _Reading(NamedTuple):
    """Holds what a process notes of the tensors that it reads, by their names in the files."""

    not_numbers: dict[str, int]
    slices: dict[str, dict[Bounds, Slice]] | None  # None: no sums are wanted


def load(abstract: nnx.State, layout: Layout, tensors: Tensors, mesh: Mesh | None, with_sums: bool = False) -> Loaded:
    """Returns a network's parameters in the network's dtype, sharded over the mesh.

    Besides the parameters, the process holds only one device's part of one tensor in memory. NaNs and infinities, as
    weights have that float16 could not hold, are counted and logged as a warning.

    Args:
      abstract: the network's Params with their logical axes; arrays or shapes.
      layout: the names of its tensors.
      tensors: the files.
      mesh: the devices; None uses only the first one.
      with_sums: whether to sum the bits of what is read, for `agreement`.

    Raises:
      WeightsError: tensors are missing, unknown, not floating-point or of another shape; the message lists them.
    """
    parameters = [_parameter(path, variable, layout) for path, variable in nnx.to_flat_state(abstract)]
    found = _check(parameters, layout, tensors)
    shardings = (
        dict(nnx.traversals.flatten_mapping(param_shardings(abstract, mesh)))
        if mesh is not None
        else {parameter.path: SingleDeviceSharding(jax.devices()[0]) for parameter in parameters}
    )
    params, reading = {}, _Reading({}, {} if with_sums else None)
    for parameter in parameters:
        params[parameter.path] = _read_parameter(parameter, found, tensors, shardings[parameter.path], reading)
    if counts := reading.not_numbers:
        shown = _listed([f"{name} ({count})" for name, count in sorted(counts.items())])
        logging.warning("%s: %d weights are NaN or infinite, in %s", tensors, sum(counts.values()), shown)
    return Loaded(nnx.traversals.unflatten_mapping(params), counts, reading.slices or {})


def load_folder(
    abstract: nnx.State, layout: Layout, folder: Path, mesh: Mesh | None, with_sums: bool = False
) -> Loaded:
    """Returns a network's parameters from a folder of safetensors files or a checkpoint of T5X (see `load`)."""
    return load(
        abstract, layout, T5xCheckpoint(folder) if is_t5x(folder) else SafetensorsFolder(folder), mesh, with_sums
    )


def open_folder(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """Returns a folder's tensors and the values of its config. A checkpoint of T5X has no config. Reads headers.

    Raises:
      WeightsError: the folder cannot be read.
    """
    if is_t5x(folder):
        return T5xCheckpoint(folder), {}
    return SafetensorsFolder(folder), read_json(Path(folder) / CONFIG)


def fingerprint(folder: Path) -> str:
    """Returns the sha256 over a folder's config and its tensors' names, dtypes, shapes and bytes.

    It does not depend on how tensors are split over files.

    Raises:
      WeightsError: the folder cannot be read.
    """
    return tensors_fingerprint(*open_folder(folder))


def tensors_fingerprint(tensors: Tensors, config: dict[str, Any], sums: dict[str, int] | None = None) -> str:
    """Returns the sha256 over tensors and the values of a config. Reads everything, piece by piece.

    It fills `sums`, if given, with the `slice_sum` of every whole tensor.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in tensors.names():
        shape, dtype = tensors.shape(name), tensors.dtype(name)
        digest.update(json.dumps([name, str(dtype), shape]).encode())
        whole, chunk = tuple(slice(0, size) for size in shape), tensors.chunk(name)
        rows = chunk[1:] == shape[1:]  # else pieces would not be in the order of the tensor's bytes
        for index in _pieces(whole, dtype.itemsize, chunk) if rows else [whole]:
            piece = np.ascontiguousarray(tensors.read(name, index))
            digest.update(piece.tobytes())
            if sums is not None:
                sums[name] = (sums.get(name, 0) + slice_sum(piece, index)) % 2**64
    return digest.hexdigest()


def read_sum(tensors: Tensors, name: str, bounds: Bounds) -> int:
    """Returns the `slice_sum` of a slice of a tensor, which it reads."""
    wanted = tuple(slice(*bound) for bound in bounds)
    pieces = _pieces(wanted, tensors.dtype(name).itemsize, tensors.chunk(name))
    return sum(slice_sum(tensors.read(name, index), index) for index in pieces) % 2**64


def _parameter(path: tuple[Any, ...], variable: nnx.Variable, layout: Layout) -> _Parameter:
    value = variable.get_value()
    axes = variable.get_metadata().get("out_sharding") or ()
    stacked, name = axes[:1] == ("layers",), layout.tensor_name(path)
    names = tuple(name.format(layer=layer) for layer in range(value.shape[0])) if stacked else (name,)
    return _Parameter(path, tuple(value.shape), value.dtype, names, stacked)


def _check(parameters: Sequence[_Parameter], layout: Layout, tensors: Tensors) -> dict[str, str]:
    """Returns the name in the files of each tensor by its current name.

    Raises:
      WeightsError: as in `load`.
    """
    found: dict[str, str] = {}
    for name in tensors.names():
        present = layout.present_name(name)
        # A matrix with two names may be stored under both.
        if present not in found or name == present:
            found[present] = name
    needed = {name: parameter for parameter in parameters for name in parameter.tensors}
    present = {name: parameter for name, parameter in needed.items() if name in found}
    misshapen = [
        f"{found[name]} {tensors.shape(found[name])} instead of {parameter.tensor_shape}"
        for name, parameter in present.items()
        if tensors.shape(found[name]) != parameter.tensor_shape
    ]
    mistyped = [
        f"{found[name]} {tensors.dtype(found[name])}"
        for name in present
        if str(tensors.dtype(found[name])) not in FLOATS
    ]
    problems = {
        "missing": [name for name in needed if name not in found],
        "unknown": [found[name] for name in found if name not in needed and not layout.is_unused(name)],
        "misshapen": misshapen,
        "not of 16, 32 or 64-bit floating-point numbers": mistyped,
    }
    if any(problems.values()):
        lines = [f"  {kind} ({len(names)}): {_listed(names)}" for kind, names in problems.items() if names]
        raise WeightsError("\n".join([f"{tensors}: the tensors are not this network's.", *lines]))
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _read_parameter(
    parameter: _Parameter, found: dict[str, str], tensors: Tensors, sharding: Sharding, reading: _Reading
) -> jax.Array:
    read = functools.partial(_read_tensor, parameter, tensors, reading=reading)
    if not parameter.stacked:
        return read(found[parameter.tensors[0]], sharding)
    layer_sharding, (zeros, set_layer) = _of_a_layer(sharding), _stacking(parameter.shape, parameter.dtype, sharding)
    stacked = zeros()
    for layer, name in enumerate(parameter.tensors):
        # Waiting keeps only one layer at a time in this process's memory.
        stacked = jax.block_until_ready(set_layer(stacked, read(found[name], layer_sharding), layer))
    return stacked


def _of_a_layer(sharding: Sharding) -> Sharding:
    """Returns the sharding of one layer of a stacked parameter."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


@functools.lru_cache(maxsize=64)  # layers have few distinct shapes
def _stacking(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> tuple[Any, Any]:
    """Returns two functions: one makes a stacked parameter of zeros, the other sets one layer of it in place."""

    def set_layer(stacked: jax.Array, layer: jax.Array, number: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, layer, number, 0)

    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    return zeros, jax.jit(set_layer, donate_argnums=0, out_shardings=sharding)


def _read_tensor(
    parameter: _Parameter, tensors: Tensors, name: str, sharding: Sharding, reading: _Reading
) -> jax.Array:
    """Returns a parameter, or one layer of it, from its tensor."""
    shape, axes = parameter.layer_shape, parameter.axes
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}  # devices by part; replicas hold the same part
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None, device
        bounds = tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in holders.items():
        values = np.empty([stop - start for start, stop in bounds], parameter.dtype)
        inverse = tuple(axes.index(axis) for axis in range(len(axes)))
        in_file = tuple(bounds[axis] for axis in inverse)
        nans, total = _fill(values.transpose(inverse), tensors, name, in_file, reading.slices is not None)
        if nans:
            reading.not_numbers[name] = reading.not_numbers.get(name, 0) + nans
        if reading.slices is not None:
            reading.slices.setdefault(name, {})[in_file] = Slice(total, len(devices))
        # Waiting keeps only one part at a time in this process's memory.
        arrays += jax.block_until_ready([jax.device_put(values, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays, dtype=parameter.dtype)


def _fill(values: np.ndarray, tensors: Tensors, name: str, bounds: Bounds, with_sum: bool) -> tuple[int, int]:
    """Writes a slice of a tensor into `values`, which has the tensor's axes.

    Returns how many of its numbers are NaN or infinite, and its `slice_sum`, or 0 without `with_sum`.
    """
    wanted, nans, total = tuple(slice(*bound) for bound in bounds), 0, 0
    for index in _pieces(wanted, tensors.dtype(name).itemsize, tensors.chunk(name)):
        piece = tensors.read(name, index)
        nans += int((~np.isfinite(piece)).sum())
        total += slice_sum(piece, index) if with_sum else 0
        place = (slice(i.start - w.start, i.stop - w.start) for i, w in zip(index, wanted, strict=True))
        values[tuple(place)] = piece
    return nans, total % 2**64


def _pieces(index: tuple[slice, ...], itemsize: int, chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yields the slice of a tensor in pieces of about PIECE_BYTES, cut between chunks on the axis with the most."""
    if not index:
        yield index
        return
    counts = [math.ceil(part.stop / size) - part.start // size for part, size in zip(index, chunk, strict=True)]
    axis = int(np.argmax(counts))
    part, size = index[axis], chunk[axis]
    layer = itemsize * size * math.prod(i.stop - i.start for i in (*index[:axis], *index[axis + 1 :]))
    step = max(PIECE_BYTES // max(layer, 1), 1) * size
    begin = part.start // size * size
    for first, last in itertools.pairwise([part.start, *range(begin + step, part.stop, step), part.stop]):
        yield (*index[:axis], slice(first, last), *index[axis + 1 :])
