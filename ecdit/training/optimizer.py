"""The optimizer: RMSProp with momentum by default (arXiv 2410.02098), clipped by global norm after a linear warm-up."""

import dataclasses
from dataclasses import field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from ecdit.config import PHASE, require


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The fields of all optimizers; an optimizer ignores those of the others."""

    name: Literal["rmsprop", "adamw", "adafactor"]
    learning_rate: float = field(metadata=PHASE)  # after warm-up, constant
    warmup_steps: int  # steps of linear warm-up from 0
    clip_norm: float  # global norm to which gradients are clipped
    moment_dtype: Literal["float32", "bfloat16"]  # dtype of stored moments; updates are computed in float32
    rmsprop_decay: float
    rmsprop_momentum: float  # an undamped trace after the preconditioner, with the effective rate lr / (1 - momentum)
    rmsprop_eps: float
    rmsprop_eps_in_sqrt: bool  # True makes eps a floor of sqrt(eps) under the root mean square
    rmsprop_bias_correction: bool  # without it the first steps are about 1 / sqrt(1 - decay) times too long
    adam_b1: float
    adam_b2: float
    adam_eps: float
    weight_decay: float  # only for adamw

    def __post_init__(self):
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be above 0")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must be 0 or more")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "must be above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")
        for key in ("rmsprop_decay", "rmsprop_momentum", "adam_b1", "adam_b2"):
            require(0 <= getattr(self, key) < 1, key, getattr(self, key), "must be in [0, 1)")
        for key in ("rmsprop_eps", "adam_eps"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be above 0")


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Returns the learning rate of update n (from 0): (n + 1) / warmup_steps of `learning_rate`, then constant."""
    return lambda count: (
        config.learning_rate * optax.schedules.linear_schedule(0.0, 1.0, max(config.warmup_steps, 1))(count + 1)
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns clipping by global norm, followed by the named optimizer under the schedule."""
    schedule = make_schedule(config)
    if config.name == "rmsprop":
        update = optax.rmsprop(
            schedule,
            decay=config.rmsprop_decay,
            eps=config.rmsprop_eps,
            eps_in_sqrt=config.rmsprop_eps_in_sqrt,
            momentum=config.rmsprop_momentum,
            bias_correction=config.rmsprop_bias_correction,
        )
    elif config.name == "adamw":
        update = optax.adamw(
            schedule, config.adam_b1, config.adam_b2, config.adam_eps, weight_decay=config.weight_decay
        )
    else:
        update = optax.adafactor(schedule, multiply_by_parameter_scale=False)
    if config.moment_dtype != "float32":
        update = _kept_as(update, jnp.dtype(config.moment_dtype))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _kept_as(update: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Returns `update` with the arrays of its state stored in `dtype` between steps; counters keep their type."""

    def cast(state: optax.OptState, to: DTypeLike) -> optax.OptState:
        def one(x: Any) -> Any:
            moment = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
            return x.astype(to) if moment and x.ndim > 0 else x

        return jax.tree.map(one, state)

    def next_update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        updates, state = update.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(update.init(params), dtype), next_update)
