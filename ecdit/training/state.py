"""The training state: created sharded, saved whole."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key

from ecdit.partitioning import replicated
from ecdit.system import Params, System


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and frozen parameters. Parameters, EMA and moments are float32."""

    step: Int[Array, ""]  # steps done, including bad ones, int32
    params: Params  # trained parameters
    ema: Params
    frozen: Params  # other parameters; empty if all are trained
    optimizer: optax.OptState
    bad_steps: Int[Array, ""]  # skipped steps: loss or gradients not finite, or the loss a spike; int32
    bad_in_row: Int[Array, ""]  # skipped steps since the last good one, int32
    usual_loss: Float[Array, ""]  # running mean over good steps, infinite before the first; float32
    # Parameters of public weights, read from their folders at each start: no checkpoint has them.
    loaded: Params = dataclasses.field(default_factory=dict)


def sampling_params(state: TrainState) -> Params:
    """Returns the whole model's parameters for sampling: the EMA of trained ones, and the frozen ones."""
    return {**state.ema, **state.frozen, **state.loaded}


def run_key(seed: int, use: Literal["init", "examples"]) -> Key[Array, ""]:
    """Returns the run's key for drawing parameters, or for the randomness of training examples."""
    return jax.random.fold_in(jax.random.key(seed), {"init": 0, "examples": 1}[use])


def state_shardings(system: System, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh) -> TrainState:
    """Returns the shardings of a TrainState: EMA and moments like their parameters, everything else replicated.

    Raises:
      ShardingError: as `partitioning.param_shardings`.
    """
    every = system.shardings(mesh)
    params, frozen = system.split(system.drawn(every))
    whole: Any = replicated(mesh)  # a TrainState has shardings here where it has arrays otherwise
    abstract_params, _ = system.split(system.drawn(system.shapes()))
    abstract = jax.eval_shape(optimizer.init, abstract_params)

    def like(moment: Any, param: Any, sharding: NamedSharding) -> NamedSharding:
        # Factored moments (adafactor) are not sharded, because their shapes differ from the parameters', and are small.
        return sharding if moment.shape == param.shape else whole

    moments = optax.tree_utils.tree_map_params(
        optimizer, like, abstract, abstract_params, params, transform_non_params=lambda _: whole
    )
    return TrainState(whole, params, params, frozen, moments, whole, whole, whole, system.loaded(every))


def init_state(
    system: System,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    seed: int,
    params: Params | None = None,
) -> TrainState:
    """Creates a state at step 0, sharded, without `loaded`. `params`, sharded likewise, replace drawn parameters."""

    def init(params: Params | None) -> TrainState:
        return _state_of(system, optimizer, system.init(run_key(seed, "init")) if params is None else params)

    return jax.jit(init, out_shardings=dataclasses.replace(shardings, loaded={}))(params)


def abstract_state(system: System, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Returns shapes, dtypes and shardings of a TrainState; allocates nothing."""
    abstract = jax.eval_shape(lambda params: _state_of(system, optimizer, params), system.drawn(system.shapes()))
    abstract = dataclasses.replace(abstract, loaded=system.loaded(system.shapes()))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def _state_of(system: System, optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    trained, frozen = system.split(params)
    zero, ema, unknown = jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, trained), jnp.float32(jnp.inf)
    return TrainState(zero, trained, ema, frozen, optimizer.init(trained), zero, zero, unknown)
