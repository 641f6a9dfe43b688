"""Draws images of captions: encodes them, integrates the guided velocity from noise, decodes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, ArrayLike, Bool, Float, Float64, Int, Key

from ecdit.components import Denoiser, TextStates
from ecdit.config import PHASE, require
from ecdit.data.memory import free_bytes
from ecdit.diffusion.flow import SAMPLE_KEY_IMPL, sample_keys, sample_noise
from ecdit.diffusion.guidance import GuidanceConfig, combine
from ecdit.diffusion.solvers import SOLVERS, call_times
from ecdit.encoders.autoencoder import to_bytes
from ecdit.errors import UserError
from ecdit.multihost import say, together
from ecdit.partitioning import batch_sharding, batch_shards, place_rows, replicated
from ecdit.progress import each
from ecdit.system import Params, System, TextToImage

# (params, tokens[B, L], null tokens[1, L], keys[B]) -> images uint8[B, H, W, 3], or images and routing: `make_sampler`.
Sampler = Callable[[Params, Int[ArrayLike, "B L"], Int[ArrayLike, "1 L"], Key[Array, " B"]], Any]
WHY_NOT_FINITE = "the weights are damaged, or the network's numbers overflow (as with a large guidance scale)"


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Selects the solver, the guidance and the batch with which images are drawn."""

    solver: Literal["euler", "heun", "multistep", "stochastic_heun"]
    num_steps: int
    time_shift: float  # above 1: more steps at high noise; 1: uniform times
    churn: float  # noise that stochastic_heun adds, S_churn of arXiv 2206.00364
    guidance: GuidanceConfig
    original_size: int = field(metadata=PHASE)  # pixels, of the micro-condition; crop is (0, 0)
    batch_size: int = field(metadata=PHASE)
    seed: int
    num_grid: int  # images of the grid that a training run draws

    def __post_init__(self):
        for key in ("num_steps", "original_size", "batch_size", "num_grid"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be 1 or more")
        # Beyond these, times of neighbouring steps would be equal.
        require(1e-3 <= self.time_shift <= 1e3, "time_shift", self.time_shift, "must be in [0.001, 1000]")
        fits = self.churn == 0 or (self.solver == "stochastic_heun" and 0 < self.churn < math.inf)
        require(fits, "churn", self.churn, f"must be 0 for {self.solver}: stochastic_heun alone adds noise, 0 or more")
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be in 0 .. 2**32 - 1")


def network_times(config: SamplingConfig) -> Float64[np.ndarray, " steps"]:
    """Returns the time at which each solver step first calls the network."""
    return call_times(config.num_steps, config.time_shift, config.churn)


def check_sampling(config: SamplingConfig, denoiser: Denoiser, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for a batch, a layout or a solver that does not fit the mesh or the denoiser."""
    shards = batch_shards(mesh)
    require(
        config.batch_size % shards == 0,
        "sampling.batch_size",
        config.batch_size,
        f"must be a multiple of the {shards} parts the mesh splits a batch into",
    )
    # A user's denoiser may have no such field.
    predicts_data = getattr(getattr(denoiser, "config", None), "prediction", "velocity") == "data"
    require(
        not predicts_data or config.solver in ("euler", "multistep"),
        "sampling.solver",
        config.solver,
        'must be "euler" or "multistep": others end with the velocity at t = 0, which model.prediction = "data" lacks',
    )
    rows = config.batch_size // shards * (1 if config.guidance.scale == 1 else 2)  # with their null captions
    denoiser.check_layout(mesh, rows, "sample")


def refuse(problem: str) -> None:
    """Raises a UserError."""
    raise UserError(problem)


def warn(problem: str) -> None:
    """Prints a warning on the first process."""
    say(f"warning: {problem}")


def make_sampler(
    system: System,
    config: SamplingConfig,
    mesh: Mesh,
    with_experts: bool = False,
    with_gates: bool = False,
    not_finite: Callable[[str], None] = refuse,
) -> Sampler:
    """Returns a compiled function (params, tokens[B, L], null tokens[1, L], keys[B]) -> uint8 images [B, H, W, 3].

    Without an autoencoder to decode with it returns latents, float32[B, h, w, c]. B is config.batch_size; the noise of
    row i is drawn from keys[i] alone. With `with_experts` it returns (images, counts) instead: how many experts took
    each token, int32[B, steps, P, N] over solver steps (the first call of each) and sparse layers, in the pass with the
    caption. With `with_gates` it returns (images, gates): each expert's gate for each token, float32[B, steps, P, N,
    E], 0 where the expert did not take the token. The images are the same.

    As bytes, a NaN is black. So `not_finite` is called with what to say where an image has a value that is not finite.
    """
    jitted = make_sample_step(system, config, mesh, with_experts, with_gates)

    def run(params: Params, tokens: ArrayLike, null_tokens: ArrayLike, keys: Array) -> Any:
        with jax.set_mesh(mesh):
            placed, key_data = place_rows(mesh, tokens), place_rows(mesh, jax.random.key_data(keys))
            drawn, finite = jitted(params, placed, null_tokens, key_data)
        if wrong := int((~np.asarray(finite)).sum()):
            not_finite(f"{wrong} of {config.batch_size} images are not finite; {WHY_NOT_FINITE}")
        return drawn

    return run


def make_sample_step(
    system: System, config: SamplingConfig, mesh: Mesh, with_experts: bool = False, with_gates: bool = False
) -> jax.stages.Wrapped:
    """Returns the jitted function of `make_sampler`. It takes arrays on the mesh, and the data of the keys, [B, K].

    It returns what the sampler returns, and bool[B]: whether all values of an image are finite.
    """
    check_sampling(config, system.parts.denoiser, mesh)
    if with_experts and with_gates:
        raise ValueError("with_experts and with_gates: ask for one, gates say how many experts took a token")
    if (with_experts or with_gates) and not system.parts.denoiser.counts_experts():
        raise ValueError("with_experts, with_gates: a dense model has no experts to count")
    rows = batch_sharding(mesh)

    def sample(params: Params, tokens: Array, null_tokens: Array, key_data: Array) -> Any:
        model = system.bind(params)
        keys = jax.random.wrap_key_data(key_data, impl=SAMPLE_KEY_IMPL)
        noise = sample_noise(keys, system.config.latent_shape)
        velocity = _velocity(model, config, tokens, null_tokens, with_experts, with_gates)
        latents, routing = solve(config, velocity, noise, keys)
        images = model.autoencoder.decode(latents) if system.config.has_images else latents
        finite = are_finite(images)
        images = to_bytes(images) if system.config.has_images else images
        return images if routing is None else (images, jnp.moveaxis(routing, 2, 0)), finite

    shardings = (system.shardings(mesh), rows, None, rows)
    return jax.jit(sample, in_shardings=shardings, out_shardings=(rows, replicated(mesh)))


def are_finite(images: Float[Array, "B h w c"]) -> Bool[Array, " B"]:
    """Returns whether all values of each image are finite."""
    return jnp.isfinite(images).all(axis=(1, 2, 3))


def solve(
    config: SamplingConfig,
    velocity: Callable[..., tuple[Array, Any]],
    noise: Float[Array, "B h w c"],
    keys: Key[Array, " B"],
) -> tuple[Float[Array, "B h w c"], Any]:
    """Integrates a velocity with aux from noise to latents; `keys` are those that the noise was drawn from."""
    drawn = {"churn": config.churn, "keys": keys} if config.solver == "stochastic_heun" else {}
    solver = SOLVERS[config.solver]
    return solver(velocity, noise, config.num_steps, has_aux=True, shift=config.time_shift, **drawn)


def _velocity(
    model: TextToImage,
    config: SamplingConfig,
    tokens: Array,
    null_tokens: Array,
    with_experts: bool,
    with_gates: bool = False,
) -> Callable[[Float[Array, "B h w c"], Float[Array, " B"]], tuple[Float[Array, "B h w c"], Array | None]]:
    """Encodes the captions, and the null caption if it is needed; returns `guided_velocity`."""
    guided = _is_guided(config)
    text: TextStates = model.text(tokens)
    return guided_velocity(model, config, text, model.text(null_tokens) if guided else text, with_experts, with_gates)


def guided_velocity(
    model: TextToImage,
    config: SamplingConfig,
    text: TextStates,
    null: TextStates,
    with_experts: bool = False,
    with_gates: bool = False,
) -> Callable[[Float[Array, "B h w c"], Float[Array, " B"]], tuple[Float[Array, "B h w c"], Array | None]]:
    """Returns the guided velocity, and what was asked for of the routing in the pass with the caption (else None).

    That is the experts per token, int32[P, B, N], or every expert's gate for it, float32[P, B, N, E]. An image and its
    null-caption twin are neighbours in one batch of 2 B. `null` is the one null caption; at scale 1 it is unused.
    """
    guided = _is_guided(config)
    metric = "expert_gates" if with_gates else "experts_per_token" if with_experts else None
    if guided:
        text = jax.tree.map(lambda c, u: _interleave(c, jnp.broadcast_to(u, c.shape)), text, null)
    sizes = jnp.array([config.original_size, config.original_size, 0, 0], jnp.float32)
    size_crop = jnp.broadcast_to(sizes[None], (text.mask.shape[0], 4))

    def velocity(x: Float[Array, "B h w c"], time: Float[Array, " B"]) -> tuple[Array, Array | None]:
        of_image = time
        if guided:
            x, time = _interleave(x, x), _interleave(time, time)
        prediction = model.denoiser(x, time, text, size_crop, None, "inspect" if with_gates else "sample")
        if metric and metric not in prediction.metrics:
            raise ValueError(f"{type(model.denoiser).__name__} reports no {metric}: see components.Prediction")
        routing = prediction.metrics[metric] if metric else None
        if not guided:
            return prediction.velocity, routing
        routing = None if routing is None else routing[:, 0::2]
        return combine(prediction.velocity[0::2], prediction.velocity[1::2], config.guidance, of_image), routing

    return velocity


def _is_guided(config: SamplingConfig) -> bool:
    """Returns whether there is a pass with the null caption."""
    return config.guidance.scale != 1


def _interleave(first: Array, second: Array) -> Array:
    """Returns [first_0, second_0, first_1, ...] along axis 0."""
    return jnp.stack([first, second], axis=1).reshape(2 * first.shape[0], *first.shape[1:])


def sample_images(
    sampler: Sampler,
    params: Params,
    tokenize: Callable[[Sequence[str]], np.ndarray],
    prompts: Sequence[str],
    repeats: Sequence[int],
    config: SamplingConfig,
) -> Any:
    """Draws an image for each (prompt, repeat), in order; returns what `sampler` returns, with n in place of B.

    Where each image is a group of its own, the same (seed, prompt, repeat) gives the same image whatever the batch
    size, the devices or the neighbours, up to float32 rounding (and near-ties of top-k that rounding decides).
    """
    keys = sample_keys(config.seed, prompts, repeats)
    tokens, null_tokens = tokenize(prompts), tokenize([""])
    # The last batch is filled up with its last row, as in `many`: the others may compete with it for experts.
    count = math.ceil(len(prompts) / config.batch_size) * config.batch_size
    filled = np.minimum(np.arange(count), len(prompts) - 1)
    batches, fetched, first = filled.reshape(-1, config.batch_size), [], jax.process_index() == 0
    for rows in each(batches, "sampling", "batches", len(batches), shown=first):
        fetched.append(jax.tree.map(_fetch, sampler(params, tokens[rows], null_tokens, keys[rows])))
        if len(fetched) == 1:
            size = sum(x.nbytes for x in jax.tree.leaves(fetched))
            together(functools.partial(_check_memory, size, len(batches)))  # hosts may differ in memory
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(prompts)], *fetched)


def _check_memory(size: int, batches: int) -> None:
    """Raises UserError if `batches` of `size` bytes do not fit in memory, where the end would be a kill hours later."""
    needed, free = 2 * size * batches, free_bytes()  # with their copy when they are joined
    if needed > free:
        raise UserError(
            f"{batches} batches of {size / 1e9:.3g} GB need {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB "
            "are free here: take fewer prompts, repeats or steps"
        )


def _fetch(x: jax.Array) -> np.ndarray:
    """Returns a sharded array whole on every host. Collective."""
    if jax.process_count() == 1:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
