"""One training step: (state, batch) -> (state, metrics), pure.

Axes: B batch, N tokens of an image, M kept tokens, P sparse layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from ecdit.diffusion.flow import ExampleKeys, example_keys, interpolate, loss_per_example, sample_time, velocity_target
from ecdit.encoders.autoencoder import to_unit
from ecdit.experiment import Experiment
from ecdit.models.config import DiTConfig, group_size
from ecdit.models.dit import RoutingReport
from ecdit.models.embeddings import patchify
from ecdit.partitioning import batch_sharding, constrain, replicated
from ecdit.runtime import compiler_options
from ecdit.system import Params, System
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import TrainState, run_key, state_shardings

# image uint8[B, h, w, 3] or latents float16[B, h, w, c], tokens int32[B, L], size_crop float32[B, 4]
Batch = dict[str, Array]
Metrics = dict[str, Array]

USUAL_LOSS_DECAY = 0.98  # of the running mean that a spike is told by: about fifty steps
SPIKE = -2  # the metric bad_leaf of a step that was skipped for its loss though all is finite


def make_train_step(
    experiment: Experiment, system: System, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step on `mesh`; it donates the state. Call it with the mesh set."""
    optimizer = make_optimizer(experiment.optimizer)
    shardings = state_shardings(system, optimizer, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, aux, grads = _accumulated_gradients(experiment, system, state, batch)
        return _gated_update(experiment, optimizer, state, loss, aux, grads)

    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(experiment.runtime, mesh),
    )


def abstract_batch(experiment: Experiment, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a batch; allocates nothing."""
    size, side, model = experiment.train.batch_size, experiment.data.image_size, experiment.model
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "tokens": ((experiment.data.caption_length,), jnp.int32),
        "size_crop": ((4,), jnp.float32),
    }
    if experiment.system.has_pictures:
        shapes["image"] = (side, side, 3), jnp.uint8
    else:
        shapes["latents"] = (model.latent_size, model.latent_size, model.latent_channels), jnp.float16
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding) for name, (shape, dtype) in shapes.items()
    }


def kept_tokens(key: Key[Array, ""], config: DiTConfig) -> Int[Array, " M"]:
    """A uniformly random subset of the tokens, in raster order."""
    order = jnp.argsort(jax.random.uniform(key, (config.num_tokens,)))
    return jnp.sort(order[: config.num_kept])


def _loss(
    params: Params, frozen: Params, experiment: Experiment, system: System, batch: Batch, keys: ExampleKeys
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a microbatch, and what to report of it."""
    model, config = system.bind({**params, **frozen}), experiment.model
    if system.config.has_pictures:
        latents = model.codec.encode(to_unit(batch["image"]), keys.codec)
    else:
        latents = batch["latents"].astype(jnp.float32)
    noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:], jnp.float32))(keys.noise)
    time = jax.vmap(lambda key: sample_time(key, experiment.flow))(keys.time)
    target = patchify(velocity_target(latents, noise), config.patch_size)

    kept, kept_mask = None, jnp.ones(target.shape[:2], bool)
    if config.mask_ratio > 0:
        kept = jax.vmap(lambda key: kept_tokens(key, config))(keys.mask)
        kept_mask = jax.vmap(lambda row: jnp.zeros(config.num_tokens, bool).at[row].set(True))(kept)

    text = model.text(batch["tokens"], config.dtype, config.remat)
    size = group_size(config.group, config.num_kept)
    predicted, report = model.denoiser(interpolate(latents, noise, time), time, text, batch["size_crop"], kept, size)
    flow_loss = loss_per_example(predicted, target, kept_mask, experiment.flow.dropped_token_weight).mean()
    metrics = {"flow_loss": flow_loss}
    loss = flow_loss
    if report is not None:
        metrics |= routing_metrics(report)
        if config.ffn == "token_choice":
            metrics["balance_loss"] = report.balance_loss.mean()
            metrics["drop_rate"] = report.drop_rate.mean()
            loss = loss + config.balance_loss_weight * metrics["balance_loss"]
        if config.router_z_loss:
            metrics["router_z_loss"] = report.z_loss.mean()
            loss = loss + config.router_z_loss * metrics["router_z_loss"]
    return loss, metrics


def routing_metrics(report: RoutingReport) -> Metrics:
    """Per sparse layer, float32[P]: share of tokens with 0, 1, 2 and 3 or more experts, and the most on one token."""
    counts = report.experts_per_token
    shares = {f"coverage_{n}": (counts == n).mean(axis=(1, 2)) for n in range(3)}
    return shares | {
        "coverage_3_or_more": (counts >= 3).mean(axis=(1, 2)),
        "coverage_most": counts.max(axis=(1, 2)).astype(jnp.float32),
    }


def _accumulated_gradients(
    experiment: Experiment, system: System, state: TrainState, batch: Batch
) -> tuple[Float[Array, ""], Metrics, Params]:
    """Loss, metrics and gradients of the whole batch, as means over its microbatches."""
    rows = jnp.arange(experiment.train.batch_size, dtype=jnp.int32)
    keys = jax.vmap(example_keys, in_axes=(None, None, 0))(run_key(experiment.seed, "examples"), state.step, rows)
    gradient = jax.value_and_grad(_loss, has_aux=True)
    count = experiment.train.accumulation
    if count == 1:
        (loss, metrics), grads = gradient(state.params, state.frozen, experiment, system, batch, keys)
        return loss, metrics, grads

    def add_microbatch(total: Params, microbatch: tuple[Batch, ExampleKeys]) -> tuple[Params, tuple[Array, Metrics]]:
        (loss, metrics), grads = gradient(state.params, state.frozen, experiment, system, *microbatch)
        return jax.tree.map(jnp.add, total, grads), (loss, metrics)

    microbatches = _split_microbatches((batch, keys), experiment)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    total, (losses, stacked) = jax.lax.scan(add_microbatch, zeros, microbatches)
    metrics = {name: x.max(axis=0) if name == "coverage_most" else x.mean(axis=0) for name, x in stacked.items()}
    return losses.mean(), metrics, jax.tree.map(lambda x: x / count, total)


def _split_microbatches(tree: Any, experiment: Experiment) -> Any:
    """[B, ...] as [count, B / count, ...]; images that share a group stay together, and rows on their device.

    Consecutive groups go to different microbatches, so that each device finds its part of every microbatch in its own
    rows, and accumulation changes neither groups nor result.
    """
    model, count = experiment.model, experiment.train.accumulation
    together = max(1, group_size(model.group, model.num_kept) // model.num_kept)  # images of a group

    def split(x: Array) -> Array:
        x = x.reshape(-1, count, together, *x.shape[1:]).swapaxes(0, 1)
        x = x.reshape(count, -1, *x.shape[3:])
        return (
            x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else constrain(x, None, "batch", *[None] * (x.ndim - 2))
        )

    return jax.tree.map(split, tree)


@jax.named_scope("optimizer")
def _gated_update(
    experiment: Experiment,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    loss: Float[Array, ""],
    metrics: Metrics,
    grads: Params,
) -> tuple[TrainState, Metrics]:
    """The next state; a step that is not finite, or a spike, leaves parameters, EMA and moments as they were."""
    squares = jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)])
    grad_norm = jnp.sqrt(squares.sum())
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    factor = experiment.train.spike_factor
    spike = finite & (loss > factor * state.usual_loss) if factor else jnp.bool_(False)
    good = finite & ~spike
    mean = USUAL_LOSS_DECAY * state.usual_loss + (1 - USUAL_LOSS_DECAY) * loss
    usual_loss = jnp.where(jnp.isinf(state.usual_loss), loss, mean)

    updates, new_optimizer = optimizer.update(grads, state.optimizer, state.params)
    new_params = optax.apply_updates(state.params, updates)
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(experiment.train.ema_decay, (1 + step) / (10 + step))
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
    )
    metrics |= {
        "loss": loss,
        "grad_norm": grad_norm,
        "router_grad_norm": router_grad_norm(grads),
        "bad_steps": new_state.bad_steps,
        "bad_in_row": new_state.bad_in_row,
        "bad_leaf": jnp.where(spike, SPIKE, jnp.where(jnp.isfinite(loss), _first_bad(squares), -1)),
    }
    return new_state, metrics


def _first_bad(squares: Float[Array, " leaves"]) -> Int[Array, ""]:
    """Index of the first leaf whose gradient is not finite, -1 for none."""
    bad: Bool[Array, " leaves"] = ~jnp.isfinite(squares)
    return jnp.where(bad.any(), jnp.argmax(bad), -1)


def router_grad_norm(grads: Params) -> Float[Array, " P"]:
    """Norm of the router's gradient in every sparse layer, float32; empty without experts."""
    experts = grads["denoiser"]["pairs"]["even"].get("experts")
    if experts is None:
        return jnp.zeros((0,))
    routers = [experts[name] for name in ("router", "time_router") if name in experts]
    return jnp.sqrt(sum(jnp.square(router).sum(axis=(1, 2)) for router in routers))
