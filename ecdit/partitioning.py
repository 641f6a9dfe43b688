"""Makes the device mesh, and maps logical axes to mesh axes by one table.

Every parameter names its logical axes where it is created (T5X's names where they exist). `AXIS_RULES` maps each to the
mesh axes over which it is sharded. An axis without a rule is an error.

Mesh axes: `slices` (pods joined by the data-centre network), `data` (replicas), `fsdp` (parameters are sharded, and
gathered at use), `expert` (experts are sharded, and an all-to-all sends tokens to them), `tensor` (heads and hidden
units are sharded). The batch is split over all of them except `tensor`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from ecdit.config import ConfigError, require
from ecdit.errors import UserError

MESH_AXES = ("slices", "data", "fsdp", "expert", "tensor")
BATCH_AXES = ("slices", "data", "fsdp", "expert")
Devices = Sequence[jax.Device]  # an alias, because jax declares Device as a variable, which signatures cannot name
TILE_ROWS = 16  # rows of a TPU's tile of bfloat16


class ShardingError(UserError, ValueError):
    """An array cannot be laid out on the mesh."""


AXIS_RULES: Mapping[str, tuple[str, ...]] = {
    # parameters
    "embed": ("fsdp", "expert"),  # the width outside experts; see `param_axes`
    "small_embed": (),  # the width of small arrays, whose gather nothing would hide
    "experts": ("expert",),
    "expert_embed": (),  # the width inside an expert, whose E is already sharded over `expert`
    "expert_mlp": ("tensor", "fsdp"),  # hidden units, which divide into whole tiles over more chips than a width
    "mlp": ("tensor",),
    "joined_kv": ("tensor",),  # joined heads
    "vocab": ("tensor",),
    "layers": (),
    "length": (),
    "features": (),  # small inputs and outputs: sinusoids, patches, E of the router
    "modulation": (),
    "norm": (),
    # activations
    "batch": BATCH_AXES,
    "heads": ("tensor",),
    "expert_groups": ("slices", "data", "fsdp"),  # groups of tokens on the devices of their experts
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. One of them may be -1 for all remaining devices."""

    slices: int
    data: int
    fsdp: int
    expert: int
    tensor: int

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            require(size == -1 or size >= 1, axis, size, "must be 1 or more, or -1 for all remaining devices")
        free = [axis for axis, size in sizes.items() if size == -1]
        require(len(free) <= 1, free[-1] if free else "", -1, f"only one axis can be -1, {' and '.join(free)} are")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Returns the sizes of MESH_AXES with -1 resolved.

    Raises:
      ConfigError: the product is not the number of devices.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % fixed == 0:
        sizes[sizes.index(-1)] = num_devices // fixed
    if math.prod(sizes) != num_devices:
        shown = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise ConfigError("mesh", shown, f"must multiply to the number of devices, {num_devices}")
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Devices | None = None) -> Mesh:
    """Makes the mesh over `devices` (default: all), with neighbours along the last axes nearest to each other."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    if getattr(devices[0], "platform", "cpu") == "cpu":
        grid = np.asarray(devices).reshape(shape)
    elif config.slices != 1:
        from jax.experimental import mesh_utils

        inside, across = (1, *shape[1:]), (shape[0], 1, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        from jax.experimental import mesh_utils

        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def devices_text(devices: Devices) -> str:
    """Returns the number and kind of devices as text: '8 TPU v4 devices'."""
    kind = "CPU" if devices[0].platform == "cpu" else devices[0].device_kind
    return f"{len(devices)} {kind} device{'s' if len(devices) > 1 else ''}"


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """Makes a mesh without devices, for checks and shapes.

    Raises:
      ConfigError: the product is not the number of devices.
    """
    return AbstractMesh(mesh_shape(config, num_devices), MESH_AXES)


def logical_spec(axes: Sequence[str | None], name: str) -> PartitionSpec:
    """Returns the PartitionSpec of an array whose dimensions have these logical axes (None: not sharded).

    Raises:
      ShardingError: an axis has no rule; the message names the array and the axis.
    """
    for axis in axes:
        if axis is not None and axis not in AXIS_RULES:
            raise ShardingError(
                f"{name}: logical axis {axis!r} of {tuple(axes)} has no rule; rules: {', '.join(AXIS_RULES)}"
            )
    return PartitionSpec(*(AXIS_RULES[axis] or None if axis is not None else None for axis in axes))


def param_axes(axis: str | None, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the mesh axes over which a parameter's dimension of `size` is sharded.

    These are the axes of AXIS_RULES. A width uses fewer of them if only then its shards are whole tiles (multiples of
    TILE_ROWS), because a TPU sums padded copies of other shards instead of gathering them.
    """
    axes = AXIS_RULES[axis] if axis is not None else ()
    if axis != "embed":
        return axes
    by_size = sorted(axes, key=lambda name: -mesh.shape[name])
    for kept in (axes, *((name,) for name in by_size)):
        if size % (TILE_ROWS * math.prod(mesh.shape[name] for name in kept)) == 0:
            return kept
    return axes


def param_shardings(params: nnx.State, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Returns NamedShardings for a state of annotated Params, abstract or real, nested like its pure dict.

    Raises:
      ShardingError: a parameter has no logical axes, an axis without a rule, or a size that does not divide. The
        message names the parameter, the axis and the sizes.
    """
    shardings: dict[tuple, NamedSharding] = {}
    for path, variable in nnx.to_flat_state(params):
        name = "/".join(map(str, path))
        shape, axes = variable.get_value().shape, variable.get_metadata().get("out_sharding")
        if axes is None or len(axes) != len(shape):
            raise ShardingError(f"{name}: shape {shape} needs one logical axis per dimension, but it has {axes}")
        logical_spec(axes, name)  # refuses an axis without a rule
        check_divides(name, shape, axes, mesh)
        over = (param_axes(axis, size, mesh) for axis, size in zip(axes, shape, strict=True))
        shardings[path] = NamedSharding(mesh, PartitionSpec(*(mesh_axes or None for mesh_axes in over)))
    return nnx.traversals.unflatten_mapping(shardings)


def check_divides(name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> None:
    """Raises ShardingError if a dimension does not divide over the mesh axes of its logical axis."""
    for size, axis in zip(shape, axes, strict=True):
        parts = {mesh_axis: mesh.shape[mesh_axis] for mesh_axis in param_axes(axis, size, mesh)}
        if size % math.prod(parts.values()):
            over = " x ".join(f"{mesh_axis} {count}" for mesh_axis, count in parts.items())
            raise ShardingError(
                f"{name}: axis {axis!r} of size {size} (shape {tuple(shape)}) does not divide over {over}"
            )


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a batch: its first dimension over BATCH_AXES."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place_rows(mesh: Mesh, arrays: Any) -> Any:
    """Puts rows of arrays, a tree that every host has whole, on the devices where the batch's sharding wants them."""

    def place(x: Any) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, batch_sharding(mesh), lambda index: host[index])

    return jax.tree.map(place, arrays)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts into which the batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of arrays of which every device has a whole copy."""
    return NamedSharding(mesh, PartitionSpec())


def on_each_shard(function: Callable[..., Any], in_dims: Sequence[int] = (0,), out_dim: int = 0) -> Callable[..., Any]:
    """Returns a function that runs `function` on each device's part of arrays that are split like a batch.

    It is for operations such as top-k, for which the compiler would otherwise gather the whole batch. It splits
    dimension `in_dims[i]` of argument i (or of each array in it) and `out_dim` of the results, which must be multiples
    of `batch_shards`. Without a mesh it returns `function` itself.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function

    def split(dim: int) -> PartitionSpec:
        return PartitionSpec(*[None] * dim, BATCH_AXES)

    return jax.shard_map(function, in_specs=tuple(split(dim) for dim in in_dims), out_specs=split(out_dim))


def axis_size(axis: str) -> int:
    """Returns the size of a mesh axis, or 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[axis]


def constrain(x: Array, *axes: str | None) -> Array:
    """Asks the compiler to shard an activation by its logical axes. Does nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, logical_spec(axes, "activation"))
