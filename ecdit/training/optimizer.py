"""The optimizer: RMSProp with momentum by default (arXiv 2410.02098), clipped by global norm, and its learning rate."""

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from ecdit.config import PHASE, ConfigError, require

_BFLOAT16_DECAY = 0.99  # the largest decay of a mean of squares that bfloat16 follows


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The fields of all optimizers; an optimizer ignores those of the others."""

    name: Literal["rmsprop", "adamw", "adafactor"]
    learning_rate: float = field(metadata=PHASE)  # after warm-up, and until it decays
    warmup_steps: int  # updates of linear warm-up from 0
    # constant: never decays; cosine: from warm-up on; warmup_stable_decay: linearly, after decay_begin updates. Skipped
    # steps are no updates.
    schedule: Literal["constant", "cosine", "warmup_stable_decay"] = field(metadata=PHASE)
    decay_begin: int = field(metadata=PHASE)  # updates before the decay of warmup_stable_decay
    decay_steps: int = field(metadata=PHASE)  # updates that the decay takes
    end_factor: float = field(metadata=PHASE)  # the rate after the decay, in learning rates
    # {"text": 0.1}: factors of the rates of parts, by the path of their parameters; the longest path counts
    learning_rate_factors: Mapping[str, float]
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
        decays = self.schedule != "constant"
        least = 1 if decays else 0
        require(self.decay_steps >= least, "decay_steps", self.decay_steps, f"must be {least} or more")
        least = self.warmup_steps if self.schedule == "warmup_stable_decay" else 0
        require(self.decay_begin >= least, "decay_begin", self.decay_begin, f"must be {least} or more: after warm-up")
        require(0 <= self.end_factor < 1, "end_factor", self.end_factor, "must be in [0, 1)")
        for part, factor in self.learning_rate_factors.items():
            number = isinstance(factor, int | float) and not isinstance(factor, bool) and factor >= 0
            require(number, f"learning_rate_factors.{part}", factor, "must be a number, 0 or more")
        for key in ("rmsprop_decay", "rmsprop_momentum", "adam_b1", "adam_b2"):
            require(0 <= getattr(self, key) < 1, key, getattr(self, key), "must be in [0, 1)")
        for key in ("rmsprop_eps", "adam_eps"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be above 0")
        if self.moment_dtype == "bfloat16":
            self._check_bfloat16()

    def _check_bfloat16(self) -> None:
        """Raises ConfigError if a mean of squares would fall by less than bfloat16 can tell, and so only ever rise.

        A step lowers it by 1 - decay of itself at most; half a unit in bfloat16's last place is 0.2 to 0.4 % of it.
        """
        allowed = f"must be float32 for {self.name}, whose decay of the mean of squares goes towards 1"
        require(self.name != "adafactor", "moment_dtype", self.moment_dtype, allowed)
        key = "adam_b2" if self.name == "adamw" else "rmsprop_decay"
        allowed = f"must be at most {_BFLOAT16_DECAY} where moments are bfloat16, which rounds smaller changes away"
        require(getattr(self, key) <= _BFLOAT16_DECAY, key, getattr(self, key), allowed)


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Returns the learning rate of update n (from 0): (n + 1) / warmup_steps of `learning_rate`, then its schedule."""

    def rate(count: Any) -> Any:
        warm = config.learning_rate * optax.schedules.linear_schedule(0.0, 1.0, max(config.warmup_steps, 1))(count + 1)
        if config.schedule == "constant":
            return warm
        # The barrier keeps the rate out of the products around it, so that programs for different decays differ little.
        return jax.lax.optimization_barrier(warm * _decay(config)(count))

    return rate


def _decay(config: OptimizerConfig) -> optax.Schedule:
    """Returns the factor of update n: 1 up to the first of `decay_steps` updates, `end_factor` after the last."""
    if config.schedule == "cosine":
        begin, decay = config.warmup_steps, optax.cosine_decay_schedule(1.0, config.decay_steps, config.end_factor)
    else:
        begin, decay = config.decay_begin, optax.linear_schedule(1.0, config.end_factor, config.decay_steps)
    return optax.join_schedules([optax.constant_schedule(1.0), decay], [begin])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns clipping by global norm, followed by the named optimizer under the schedule and the factors of parts."""
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
    if config.learning_rate_factors:
        update = optax.chain(update, _scaled_by_part(config.learning_rate_factors))
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


def check_factors(config: OptimizerConfig, trained: Mapping[str, Any]) -> None:
    """Raises ConfigError unless each of `learning_rate_factors` belongs to parameters in `trained`, a nested dict."""
    for part, factor in config.learning_rate_factors.items():
        found, path = trained, part.split("/")
        for i, name in enumerate(path):
            if not isinstance(found, Mapping) or name not in found:
                above = "/".join(path[:i])
                has = ", ".join(sorted(found)) if isinstance(found, Mapping) else "no parts"
                allowed = f"must be a path of trained parameters: {above or 'the model'} has {has}"
                raise ConfigError(f"optimizer.learning_rate_factors.{part}", factor, allowed)
            found = found[name]


def _scaled_by_part(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Returns a multiplication of updates by the factor of the longest path that is a part of theirs, or by 1.

    The optimizers are linear in the learning rate, so this is a factor of it, also for weight decay.
    """

    def scale(path: tuple[Any, ...], update: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        parts = [part for part in factors if f"{name}/".startswith(f"{part}/")]
        return update * factors[max(parts, key=len)] if parts else update

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))
