"""Defines the flow objective: path, times and loss, and the random keys of training and sampling.

Time: t = 0 is data, t = 1 is noise. Rectified flow (arXiv 2209.03003, with its time axis reversed):

    x_t = t noise + (1 - t) data                    (1)
    v   = d x_t / dt = noise - data                 (2)  the network's prediction
    t   = sigmoid(z),  z ~ N(time_mean, time_std^2) (3)  arXiv 2403.03206, section 3.1

A sampler integrates v from t = 1 down to t = 0. Path and velocity are float32, whatever the dtype of their inputs.

Keys: no random state is stored, because keys are recomputed from numbers that a run already has.

    training   fold_in(fold_in(fold_in(key, step), row), use)   row: index in the global batch; use: ExampleKeys' order
    sampling   fold_in(fold_in(fold_in(key(seed), word_0), word_1), repeat)
               word_0, word_1: the first 8 bytes of sha256(prompt in UTF-8) as two big-endian uint32

So an example's noise depends neither on the number of hosts nor on other examples, and an image depends only on (seed,
prompt, repeat). A new use of randomness goes to the end of ExampleKeys and leaves the others unchanged.

Axes: B batch, N tokens, D channels of a token (patch^2 * channels); `...` any shape of one example.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from ecdit.config import PHASE, require

# Threefry is named, because numbers of the `rbg` generator under vmap depend on the rest of the batch.
SAMPLE_KEY_IMPL = "threefry2x32"
LEAST_TIME = 0.05  # the smallest divisor of `velocity_towards`

# (x_t, t) -> velocity, the only view of a network in guidance and solvers.
Velocity: TypeAlias = Callable[[Float[Array, "B ..."], Float[Array, " B"]], Float[Array, "B ..."]]


@dataclass(frozen=True)
class FlowConfig:
    """Configures the distribution of times and the weights of the loss."""

    time_mean: float = field(metadata=PHASE)  # mean of z in (3); above 0 favours noise
    time_std: float = field(metadata=PHASE)  # standard deviation of z in (3)
    # weight of the mean squared error on dropped tokens; 0 ignores them
    dropped_token_weight: float = field(metadata=PHASE)

    def __post_init__(self):
        require(math.isfinite(self.time_mean), "time_mean", self.time_mean, "must be finite")
        require(0 < self.time_std < math.inf, "time_std", self.time_std, "must be positive and finite")
        weight = self.dropped_token_weight
        require(0 <= weight < math.inf, "dropped_token_weight", weight, "must be finite and at least 0")


def sample_time(key: Key[Array, ""], config: FlowConfig) -> Float32[Array, ""]:
    """Draws one example's time by equation (3)."""
    return jax.nn.sigmoid(config.time_mean + config.time_std * jax.random.normal(key, (), jnp.float32))


def interpolate(
    data: Float[Array, "B ..."], noise: Float[Array, "B ..."], time: Float[Array, " B"]
) -> Float32[Array, "B ..."]:
    """Returns x_t, equation (1)."""
    time = time.astype(jnp.float32).reshape(time.shape + (1,) * (data.ndim - time.ndim))
    return time * noise.astype(jnp.float32) + (1 - time) * data.astype(jnp.float32)


def velocity_target(data: Float[Array, "B ..."], noise: Float[Array, "B ..."]) -> Float32[Array, "B ..."]:
    """Returns v, equation (2)."""
    return noise.astype(jnp.float32) - data.astype(jnp.float32)


def velocity_towards(
    data: Float[Array, "B ..."], noisy: Float[Array, "B ..."], time: Float[Array, " B"]
) -> Float32[Array, "B ..."]:
    """Returns the velocity (x_t - data) / t that belongs to a prediction of the data, equations (1) and (2).

    Times below `LEAST_TIME` count as that, because 1 / t would multiply errors of the prediction (arXiv 2511.13720,
    which clips there too). So down there it is too small, as is the target that `target_scale` gives the loss. At t = 0
    it is of no use: a solver must not call it there.
    """
    time = jnp.maximum(time.astype(jnp.float32), LEAST_TIME)
    time = time.reshape(time.shape + (1,) * (data.ndim - time.ndim))
    return (noisy.astype(jnp.float32) - data.astype(jnp.float32)) / time


def target_scale(time: Float[Array, " B"], predicts_data: bool) -> Float32[Array, " B"]:
    """Returns what the true velocity is multiplied by in the loss: 1, or t / max(t, 0.05) where the data is predicted.

    Then right data has no loss at any time, and an error of the data counts 1 / max(t, 0.05) times, as in
    arXiv 2511.13720, which divides by max(t, 0.05) for predicted and true velocities alike.
    """
    time = time.astype(jnp.float32)
    return time / jnp.maximum(time, LEAST_TIME) if predicts_data else jnp.ones_like(time)


def loss_per_example(
    predicted: Float[Array, "B N D"],
    target: Float[Array, "B N D"],
    weights: Float[Array, "B N"],
    dropped_token_weight: float,
) -> Float32[Array, " B"]:
    """Returns the mean squared error over kept tokens + weight * the mean squared error over dropped tokens.

    `weights` are 1 on kept tokens and 0 on dropped ones, or between. Each mean is over its own tokens' elements, so
    that the masked share does not change the loss's scale; a mean over no tokens is 0. With dropped_token_weight 0,
    even a NaN on a dropped token changes neither loss nor gradient.
    """
    error = predicted.astype(jnp.float32) - target.astype(jnp.float32)
    kept = _mean_square(error, weights)
    if dropped_token_weight == 0:
        return kept
    return kept + dropped_token_weight * _mean_square(error, 1 - weights)


def _mean_square(error: Float32[Array, "B N D"], weights: Float[Array, "B N"]) -> Float32[Array, " B"]:
    # Errors without weight are zeroed before the square; after it, the gradient of a NaN would be NaN * 0.
    error = jnp.where(weights[..., None] > 0, error, 0)
    num_elements = jnp.sum(weights, axis=-1, dtype=jnp.float32) * error.shape[-1]
    total = jnp.sum(weights[..., None] * jnp.square(error), axis=(-2, -1))
    return total / jnp.where(num_elements > 0, num_elements, 1)


class ExampleKeys(NamedTuple):
    """One training example's keys by use. Only append, because the order determines the keys."""

    noise: Key[Array, ""]
    time: Key[Array, ""]
    mask: Key[Array, ""]  # selects the dropped tokens
    autoencoder: Key[Array, ""]  # latents drawn from an autoencoder's posterior


def example_key(key: Key[Array, ""], step: int | Int[Array, ""], row: int | Int[Array, ""]) -> Key[Array, ""]:
    """Returns the key of one example; `row` counts from 0 in the global batch of `step`."""
    return jax.random.fold_in(jax.random.fold_in(key, step), row)


def example_keys(key: Key[Array, ""], step: int | Int[Array, ""], row: int | Int[Array, ""]) -> ExampleKeys:
    """Returns an example's keys by use. For a batch: `jax.vmap(example_keys, (None, None, 0))(key, step, rows)`."""
    key = example_key(key, step, row)
    return ExampleKeys(*(jax.random.fold_in(key, use) for use in range(len(ExampleKeys._fields))))


def sample_key(seed: int, prompt: str, repeat: int) -> Key[Array, ""]:
    """Returns the key of image number `repeat` of `prompt`. Runs on the host, because it hashes text."""
    return sample_keys(seed, [prompt], [repeat])[0]


def sample_keys(seed: int, prompts: Sequence[str], repeats: Sequence[int]) -> Key[Array, " B"]:
    """Returns the stacked `sample_key` of each (prompt, repeat).

    `prompts` and `repeats` have the same length; repeats are at least 0.
    """
    digests = b"".join(hashlib.sha256(prompt.encode("utf-8")).digest()[:8] for prompt in prompts)
    words = np.frombuffer(digests, dtype=">u4").astype(np.uint32).reshape(len(prompts), 2)
    root = jax.random.key(seed, impl=SAMPLE_KEY_IMPL)

    def fold(words: Array, repeat: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(root, words[0]), words[1]), repeat)

    return jax.vmap(fold)(jnp.asarray(words), jnp.asarray(np.array(repeats, np.uint32)))


def sample_noise(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Float32[Array, "B ..."]:
    """Returns x at t = 1: standard normal noise of `shape` for each key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
