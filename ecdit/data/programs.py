"""Compiles the networks that compute columns, before their weights are read, so that their memory is known by then."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from ecdit.data.memory import PROCESS_BYTES
from ecdit.partitioning import batch_sharding, param_shardings


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function of a network's parameters and a batch."""

    abstract: nnx.State  # Params of shapes, with their logical axes
    mesh: Mesh
    call: Callable[..., Any]
    process_bytes: int  # memory of a process that runs it on CPUs; 0 on accelerators, which have memory of their own

    def run(self, params: dict[str, Any], batch: Any) -> Any:
        """Returns the function's result."""
        with jax.set_mesh(self.mesh):
            return self.call(params, batch)


def compiled(function: Callable[..., Any], abstract: nnx.State, batch: jax.ShapeDtypeStruct, mesh: Mesh) -> Program:
    """Compiles `function(params, batch)` for a mesh of this process's devices, over which rows are split."""
    rows, shapes, shardings = batch_sharding(mesh), nnx.to_pure_dict(abstract), param_shardings(abstract, mesh)
    jitted = jax.jit(function, in_shardings=(shardings, rows), out_shardings=rows)
    with jax.set_mesh(mesh):
        call = jitted.lower(shapes, batch).compile()
    if mesh.devices.flat[0].platform != "cpu":
        return Program(abstract, mesh, call, 0)
    held = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    analysis: Any = call.memory_analysis()  # of one device
    of_a_device = sum(jax.tree.leaves(held)) + analysis.temp_size_in_bytes
    return Program(abstract, mesh, call, PROCESS_BYTES + mesh.devices.size * of_a_device)
