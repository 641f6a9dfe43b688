"""Looks for silent errors of the hardware: computes a batch's gradients twice, and compares copies of parameters.

Bits are compared by checksums that each device computes of what it holds. Gradients that differ between two runs of one
program on one batch were computed wrongly at least once; the devices that hold them are named (after a sum over
devices these may be all that share it). Parameters that several devices hold must be equal on all of them.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ecdit.checkpoints.checksums import shard_sums
from ecdit.config import require
from ecdit.errors import UserError
from ecdit.partitioning import Devices
from ecdit.system import Params
from ecdit.training.state import TrainState
from ecdit.training.step import Batch, Metrics

DETERMINISTIC_GPU = "--xla_gpu_deterministic_ops=true"

Gradients = Callable[[TrainState, Batch], Params]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class CorruptionError(UserError):
    """A device has computed or kept something wrongly, and no error was reported."""


def check_deterministic(replay_every: int, platform: str, xla_flags: Sequence[str]) -> None:
    """Raises ConfigError if replays are asked for where the same program may give other bits."""
    fits = not replay_every or platform in ("cpu", "tpu") or DETERMINISTIC_GPU in xla_flags
    wanted = f"must be 0 on {platform}, or runtime.xla_flags must have {DETERMINISTIC_GPU}"
    require(fits, "train.replay_every", replay_every, wanted)


def replayed(
    train_step: Step, gradients: Gradients, every: int, done: int, compiling: Callable[[], None] = lambda: None
) -> Step:
    """Returns `train_step` with a replay before every `every`-th step, 0 for none; `done` steps are done.

    Calls `compiling` before the first replay, which compiles.

    A replay costs two more computations of the gradients, and the memory of one set of them. Where it finds an error,
    the step raises CorruptionError on all processes.
    """
    if not every:
        return train_step
    step, compiled = done, False

    def checked(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        nonlocal step, compiled
        step += 1
        if step % every == 0 and not compiled:
            compiling()
            compiled = True
        if step % every == 0 and (problem := replay(gradients, state, batch)):
            raise CorruptionError(
                f"step {step}: {problem}. Take the device out of the run; checkpoints that were saved since the last "
                "replay that was well may hold the error."
            )
        return train_step(state, batch)

    return checked


def replay(gradients: Gradients, state: TrainState, batch: Batch) -> str:
    """Returns what is wrong with the devices, the same on all processes; "" for nothing. Collective."""
    problems = []
    first, again = (device_sums(gradients(state, batch)) for _ in range(2))
    if wrong := [device for device in first if not np.array_equal(first[device], again[device])]:
        problems.append(f"the gradients of one batch, computed twice, differ on {_names(wrong)}")
    for part, name in ((state.params, "parameters"), (state.ema, "EMA weights")):
        if wrong := unequal_copies(part):
            problems.append(f"copies of the {name} on {_names(wrong)} differ from those on most devices")
    return "; ".join(problems)


def device_sums(tree: Params) -> dict[Any, np.ndarray]:
    """Returns the checksums of the shards that each device holds, uint32[arrays, 2]. Collective."""
    arrays = jax.tree.leaves(tree)
    mesh = arrays[0].sharding.mesh
    sums = _program(mesh, tuple(array.sharding.spec for array in arrays))(arrays)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        sums = multihost_utils.process_allgather(sums, tiled=True)
    return dict(zip(mesh.devices.flatten().tolist(), np.asarray(sums), strict=True))


def unequal_copies(tree: Params) -> Devices:
    """Returns the devices whose copies of arrays are not those of most devices that hold the same. Collective."""
    wrong, found = set(), device_sums(tree)
    for n, array in enumerate(jax.tree.leaves(tree)):
        groups: dict[str, list[Any]] = {}
        for device, index in array.sharding.devices_indices_map(array.shape).items():
            groups.setdefault(str(index), []).append(device)
        for devices in groups.values():
            usual = Counter(found[device][n].tobytes() for device in devices).most_common(1)[0][0]
            wrong |= {device for device in devices if found[device][n].tobytes() != usual}
    return sorted(wrong, key=lambda device: device.id)


@functools.cache
def _program(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[[list[jax.Array]], jax.Array]:
    each_device = PartitionSpec(mesh.axis_names)

    def sums(arrays: list[jax.Array]) -> jax.Array:
        return jnp.stack([shard_sums(x) for x in arrays])[None]

    return jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=(list(specs),), out_specs=each_device, check_vma=False))


def _names(devices: Devices) -> str:
    return ", ".join(f"device {device.id} ({device.device_kind}, process {device.process_index})" for device in devices)
