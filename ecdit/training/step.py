"""One training step: (state, batch) -> (state, metrics), pure.

Axes: B batch, h w c a latent's height, width and channels, H W an image's height and width.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ecdit.components import Metrics, TextStates
from ecdit.diffusion.flow import (
    ExampleKeys,
    FlowConfig,
    example_keys,
    interpolate,
    loss_per_example,
    sample_time,
    target_scale,
    velocity_target,
)
from ecdit.encoders.autoencoder import to_unit
from ecdit.partitioning import batch_sharding, constrain, replicated
from ecdit.patches import patchify
from ecdit.system import Params, System, SystemConfig, make_system
from ecdit.training.config import StepConfig, TrainConfig
from ecdit.training.optimizer import make_optimizer, make_schedule
from ecdit.training.state import TrainState, run_key, state_shardings

# image uint8[B, H, W, 3] or latents float16[B, h, w, 2c], size_crop float32[B, 4], tokens int32[B, L] or text_states
# bfloat16[B, L, t], text_mask bool[B, L] and text_pooled bfloat16[B, p]
Batch = dict[str, Array]

USUAL_LOSS_DECAY = 0.98  # decay of the running mean that defines a spike: about fifty steps
SPIKE = -2  # the metric bad_leaf of a step that was skipped because its finite loss was a spike


def make_train_step(
    config: StepConfig, system: System, mesh: Mesh, compiler_options: dict[str, str] | None = None
) -> jax.stages.Wrapped:
    """Returns the jitted step on `mesh`, (state, batch) -> (state, metrics); it donates the state.

    Call it with the mesh set.

    `compiler_options` are jax.jit's: see `runtime.compiler_options`.
    """
    optimizer, schedule = make_optimizer(config.optimizer), make_schedule(config.optimizer)
    shardings = state_shardings(system, optimizer, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, metrics, grads = _accumulated_gradients(config, system, state, batch)
        metrics |= system.parts.denoiser.gradient_metrics(grads["denoiser"])
        metrics["learning_rate"] = jnp.asarray(schedule(state.step - state.bad_steps))  # a skipped step is no update
        return _gated_update(config.train, optimizer, state, loss, metrics, grads)

    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options,
    )


def make_gradients(
    config: StepConfig, system: System, mesh: Mesh, compiler_options: dict[str, str] | None = None
) -> jax.stages.Wrapped:
    """Returns a jitted function for the gradients of a step alone, laid out as the parameters; it donates nothing."""
    shardings = state_shardings(system, make_optimizer(config.optimizer), mesh)
    return jax.jit(
        lambda state, batch: _accumulated_gradients(config, system, state, batch)[2],
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=shardings.params,
        compiler_options=compiler_options,
    )


def abstract_batch(config: SystemConfig, batch_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and shardings of a batch; allocates nothing."""
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"size_crop": ((4,), jnp.float32)}
    if config.text.encode == "prepared":
        widths = make_system(config).parts.text.widths
        shapes["text_states"] = (config.text_length, widths.states), jnp.bfloat16
        shapes["text_mask"] = (config.text_length,), jnp.bool_
        shapes["text_pooled"] = (widths.pooled,), jnp.bfloat16
    else:
        shapes["tokens"] = (config.text_length,), jnp.int32
    if not config.reads_latents:
        shapes["image"] = (config.image_size, config.image_size, 3), jnp.uint8
    else:
        height, width, channels = config.latent_shape
        shapes["latents"] = (height, width, 2 * channels), jnp.float16
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def _loss(
    params: Params, frozen: Params, flow: FlowConfig, system: System, batch: Batch, keys: ExampleKeys
) -> tuple[Float[Array, ""], Metrics]:
    """Returns the loss of a microbatch, and its metrics."""
    model = system.bind({**params, **frozen})
    content = batch["latents"].astype(jnp.float32) if system.config.reads_latents else to_unit(batch["image"])
    latents = model.autoencoder.encode(content, keys.autoencoder)
    noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:], jnp.float32))(keys.noise)
    time = jax.vmap(lambda key: sample_time(key, flow))(keys.time)
    text = text_states(functools.partial(model.text, mode="train"), batch, system.config.text.dtype)
    noisy = interpolate(latents, noise, time)
    predicted = model.denoiser(noisy, time, text, batch["size_crop"], keys.mask, "train")

    tokens = predicted.loss_weights.shape[1]
    patch = latents.shape[1] // round(tokens**0.5)
    target = velocity_target(latents, noise) * target_scale(time, system.config.predicts_data)[:, None, None, None]
    velocity, target = (patchify(x, patch) for x in (predicted.velocity, target))
    flow_loss = loss_per_example(velocity, target, predicted.loss_weights, flow.dropped_token_weight).mean()
    return flow_loss + predicted.auxiliary_loss, {"flow_loss": flow_loss, **predicted.metrics}


def text_states(encode: Callable[..., TextStates], batch: Batch, dtype: str) -> TextStates:
    """Returns the encoded captions of a batch, or those that it holds."""
    if "tokens" in batch:
        return encode(batch["tokens"])
    return TextStates(batch["text_states"].astype(dtype), batch["text_mask"], batch["text_pooled"].astype(dtype))


def _accumulated_gradients(
    config: StepConfig, system: System, state: TrainState, batch: Batch
) -> tuple[Float[Array, ""], Metrics, Params]:
    """Returns loss, metrics and gradients of the whole batch, as means over its microbatches."""
    rows = jnp.arange(config.train.batch_size, dtype=jnp.int32)
    keys = jax.vmap(example_keys, in_axes=(None, None, 0))(run_key(config.seed, "examples"), state.step, rows)
    gradient = jax.value_and_grad(_loss, has_aux=True)
    fixed = {**state.frozen, **state.loaded}
    count = config.train.accumulation
    if count == 1:
        (loss, metrics), grads = gradient(state.params, fixed, config.flow, system, batch, keys)
        return loss, metrics, grads

    def add_microbatch(total: Params, microbatch: tuple[Batch, ExampleKeys]) -> tuple[Params, tuple[Array, Metrics]]:
        (loss, metrics), grads = gradient(state.params, fixed, config.flow, system, *microbatch)
        return jax.tree.map(jnp.add, total, grads), (loss, metrics)

    microbatches = _split_microbatches((batch, keys), count, system.parts.denoiser.images_together("train"))
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    total, (losses, stacked) = jax.lax.scan(add_microbatch, zeros, microbatches)
    metrics = {name: x.max(axis=0) if name.endswith("_most") else x.mean(axis=0) for name, x in stacked.items()}
    return losses.mean(), metrics, jax.tree.map(lambda x: x / count, total)


def _split_microbatches(tree: Any, count: int, together: int) -> Any:
    """Reshapes arrays [B, ...] to [count, B / count, ...]; `together` consecutive images stay together.

    Consecutive groups of images go to different microbatches, so that each device finds its part of every microbatch in
    its own rows. So accumulation changes neither groups nor result.
    """

    def split(x: Array) -> Array:
        x = x.reshape(-1, count, together, *x.shape[1:]).swapaxes(0, 1)
        x = x.reshape(count, -1, *x.shape[3:])
        return (
            x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else constrain(x, None, "batch", *[None] * (x.ndim - 2))
        )

    return jax.tree.map(split, tree)


@jax.named_scope("optimizer")
def _gated_update(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    loss: Float[Array, ""],
    metrics: Metrics,
    grads: Params,
) -> tuple[TrainState, Metrics]:
    """Returns the next state; a step that is not finite, or a spike, leaves parameters, EMA and moments unchanged."""
    squares = jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)])
    grad_norm = jnp.sqrt(squares.sum())
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    factor = config.spike_factor
    spike = finite & (loss > factor * state.usual_loss) if factor else jnp.bool_(False)
    good = finite & ~spike
    mean = USUAL_LOSS_DECAY * state.usual_loss + (1 - USUAL_LOSS_DECAY) * loss
    usual_loss = jnp.where(jnp.isinf(state.usual_loss), loss, mean)

    updates, new_optimizer = optimizer.update(grads, state.optimizer, state.params)
    new_params = optax.apply_updates(state.params, updates)
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
    new_ema = jax.tree.map(lambda ema, param: decay * ema + (1 - decay) * param, state.ema, new_params)

    def gate(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

    bad = 1 - good.astype(jnp.int32)
    new_state = TrainState(
        step=state.step + 1,
        params=gate(new_params, state.params),
        ema=gate(new_ema, state.ema),
        frozen=state.frozen,
        optimizer=gate(new_optimizer, state.optimizer),
        bad_steps=state.bad_steps + bad,
        bad_in_row=(state.bad_in_row + 1) * bad,
        usual_loss=gate(usual_loss, state.usual_loss),
        loaded=state.loaded,
    )
    metrics |= {
        "loss": loss,
        "grad_norm": grad_norm,
        "bad_steps": new_state.bad_steps,
        "bad_in_row": new_state.bad_in_row,
        "bad_leaf": jnp.where(spike, SPIKE, jnp.where(jnp.isfinite(loss), _first_bad(squares), -1)),
    }
    return new_state, metrics


def _first_bad(squares: Float[Array, " leaves"]) -> Int[Array, ""]:
    """Returns the index of the first leaf whose gradient is not finite, or -1."""
    bad: Bool[Array, " leaves"] = ~jnp.isfinite(squares)
    return jnp.where(bad.any(), jnp.argmax(bad), -1)
