"""Compiles a run's own step with the TPU compiler, which needs no TPU."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ecdit.chips import Chip, chip_named
from ecdit.components import Mode
from ecdit.diffusion.flow import sample_keys
from ecdit.errors import UserError
from ecdit.experiment import Experiment, check_mesh
from ecdit.partitioning import make_mesh
from ecdit.planning.collectives import DevicePosition, Torus
from ecdit.runtime import compiler_options
from ecdit.sampling.sampler import make_sample_step
from ecdit.system import make_system
from ecdit.topology import Slice, find_slice
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import TrainState, abstract_state, state_shardings
from ecdit.training.step import abstract_batch, make_train_step

What = Mode


class DoesNotFit(UserError):
    """The step needs more memory than a device has. The message is a shortened message of the compiler."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The slices for which a step is compiled."""

    name: str  # such as 2xv5p:4x4x8
    slice: Slice
    num_slices: int
    chip: Chip

    @property
    def num_chips(self) -> int:
        """Returns the number of chips of all slices."""
        return self.slice.chips * self.num_slices

    @property
    def num_devices(self) -> int:
        """Returns the number of JAX devices of all slices, which is the size of the mesh."""
        return self.slice.devices * self.num_slices


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The compiler's result."""

    text: str  # scheduled HLO
    memory: Any  # the compiler's memory analysis, bytes per device
    state: TrainState | None  # shapes and shardings; None for sampling
    torus: Torus


def find_target(name: str) -> Target:
    """Returns the target with a topology's name: `v5p:4x4x8`, `v5p-256`, or `2xv5p:4x4x8` for two slices.

    Raises:
      UserError: the slice does not exist.
    """
    several = re.fullmatch(r"(\d+)x(\D.+)", name)
    count, single = (int(several.group(1)), several.group(2)) if several else (1, name)
    if count < 1:
        raise UserError(f"topology {name!r}: needs at least one slice")
    found = find_slice(single)
    chip = chip_named(found.chip)
    assert chip is not None  # the tables of slices and of chips have the same names
    return Target(name, found, count, chip)


def use_compiler() -> None:
    """Prepares this process to compile for TPUs without a TPU. Call it before the first use of a device.

    The environment variables keep libtpu from querying the host's metadata and from locking out other processes.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    # Without a TPU, JAX cannot read programs for TPUs back from its cache.
    jax.config.update("jax_enable_compilation_cache", False)


def target_devices(target: Target) -> list[Any]:
    """Returns descriptions of the target's devices.

    Raises:
      UserError: the TPU compiler is not installed, or does not know such slices.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": target.num_slices} if target.num_slices > 1 else {}
    if target.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip form one device, as on v5p
    if target.slice.chips == 1:  # by default a host has four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{target.chip.name}:{target.slice.topology}", **options
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        missing = importlib.util.find_spec("libtpu") is None
        advice = ". Install it with pip install libtpu" if missing else ""
        raise UserError(f"{target.name}: the TPU compiler cannot be used: {first}{advice}") from error
    return list(described.devices)


def compile_step(experiment: Experiment, target: Target, what: What = "train") -> CompiledStep:
    """Compiles the step of `experiment`, which has no phases, exactly as a run on the target would.

    Raises:
      ConfigError: the mesh, batch or groups do not fit the target.
      DoesNotFit: the step needs more memory than the chips have.
    """
    mesh = make_mesh(experiment.mesh, target_devices(target))
    check_mesh(experiment, mesh)
    lowered, state = _lower_train(experiment, mesh) if what == "train" else (_lower_sample(experiment, mesh), None)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if "vmem" in str(error).lower():  # other remat policies or larger slices would not help
            message = f"a kernel does not fit the chip's VMEM; set model.attention=plain: {_shortened(str(error))}"
            raise UserError(message) from error
        raise DoesNotFit(_shortened(str(error))) from error
    return CompiledStep(compiled.as_text() or "", compiled.memory_analysis(), state, make_torus(mesh, target.chip))


def make_torus(mesh: Mesh, chip: Chip) -> Torus:
    """Returns the positions of the devices of a mesh."""
    places = [
        DevicePosition(tuple(device.coords), getattr(device, "slice_index", 0), index, device.core_on_chip)
        for index, device in np.ndenumerate(mesh.devices)
    ]
    shape = tuple(1 + max(side) for side in zip(*(place.coords for place in places), strict=True))
    return Torus(chip, shape, places, tuple(mesh.axis_names))


def shard_bytes(tree: Any) -> int:
    """Returns the bytes of a tree of sharded arrays on one device, without padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "sharding")
    )


def _lower_train(experiment: Experiment, mesh: Mesh) -> tuple[jax.stages.Lowered, TrainState]:
    system, optimizer = make_system(experiment.system), make_optimizer(experiment.optimizer)
    state = abstract_state(system, optimizer, state_shardings(system, optimizer, mesh))
    options = compiler_options(experiment.runtime, mesh)
    step = make_train_step(
        experiment.step_config, system, mesh, options
    )  # before the mesh is set, because optax makes arrays
    with jax.set_mesh(mesh):
        return step.lower(state, abstract_batch(experiment.system, experiment.train.batch_size, mesh)), state


def _lower_sample(experiment: Experiment, mesh: Mesh) -> jax.stages.Lowered:
    system, sampling = make_system(experiment.system), experiment.sampling
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), system.shapes(), system.shardings(mesh)
    )
    rows, length = sampling.batch_size, experiment.data.caption_length
    tokens, null = (jax.ShapeDtypeStruct((count, length), jnp.int32) for count in (rows, 1))
    key = jax.random.key_data(sample_keys(sampling.seed, [""], [0]))
    keys = jax.ShapeDtypeStruct((rows, *key.shape[1:]), key.dtype)
    step = make_sample_step(system, sampling, mesh)
    with jax.set_mesh(mesh):
        return step.lower(params, tokens, null, keys)


def _shortened(message: str) -> str:
    """Returns the first line of the compiler's message and its three largest allocations."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    sizes = [i for i, line in enumerate(lines) if re.match(r"\d+\. Size: ", line)]
    largest = [" ".join(lines[i : i + 4]) for i in sizes[:3]]
    return "\n  ".join([lines[0].removeprefix("RESOURCE_EXHAUSTED: "), *largest])
