"""Makes a system whose network knows the data and records its inputs, so that its predictions are known by hand.

It replaces `system.System` and compiles in a second. A real network with a wrong time or mask still learns, so its
losses do not show such faults.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from ecdit.components import Prediction, TextStates
from ecdit.diffusion.flow import LEAST_TIME
from ecdit.models.dit import kept_tokens
from ecdit.models.moe import RoutingReport
from ecdit.models.routing_metrics import coverage, routing_losses
from ecdit.partitioning import replicated
from ecdit.system import System, make_system

PIXEL = 51  # of every image, in all three channels
DATA = PIXEL / 127.5 - 1


class KnowingSystem(System):
    """Predicts the velocity (x_t - DATA) / t, which is noise - DATA exactly if the time it is told is that of x_t.

    With predicted data it divides by 0.05 below that time, as the model does.

    To the velocity of kept tokens it adds `error` t, to that of dropped ones 2 `error` t; `error` is its parameter.
    The experts of a token are the integer part of 5 t; its report's balance loss, drop rate and z-loss are the means of
    t, 2 t and 3 t over a microbatch.
    """

    def __init__(self, experiment):
        parts = SimpleNamespace(denoiser=make_system(experiment.system).parts.denoiser)
        self.__dict__.update(config=experiment.system, given=[], parts=parts)  # a System is frozen

    def params(self, error=0.0):
        return {"denoiser": {"pairs": {"even": {}}, "error": np.float32(error)}}

    def shapes(self):
        return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, self.params()))

    def shardings(self, mesh):
        return jax.tree.map(lambda _: replicated(mesh), self.shapes())

    def split(self, params):
        return params, {}

    def bind(self, params):
        autoencoder = self.config.make_autoencoder()
        denoiser = lambda *given: self._denoise(params, *given)  # noqa: E731
        return SimpleNamespace(autoencoder=autoencoder, text=self._text, denoiser=denoiser)

    def _text(self, tokens, mode="sample"):
        del mode
        states = jnp.zeros((*tokens.shape, self.config.text.width))
        return TextStates(states, tokens > 0, states[:, 0])

    def _denoise(self, params, latents, time, text, size_crop, mask_keys, mode):
        del text
        model, (batch, side, _, channels) = self.config.model, latents.shape
        dropped = jnp.zeros((batch, model.num_tokens))
        if mask_keys is not None and model.mask_ratio:
            kept = jax.vmap(lambda key: kept_tokens(key, model))(mask_keys)
            dropped = jax.vmap(lambda row: jnp.ones(model.num_tokens).at[row].set(0.0))(kept)
        given = {"latents": latents, "time": time, "size_crop": size_crop, "dropped": dropped}
        jax.debug.callback(lambda **arrays: self.given.append(jax.tree.map(np.asarray, arrays)), **given)
        assert (side, channels) == (model.latent_size, model.latent_channels)
        least = LEAST_TIME if model.prediction == "data" else 0.0
        velocity = (latents - DATA) / jnp.maximum(time, least)[:, None, None, None]
        wrong = params["denoiser"]["error"] * time[:, None] * (1 + dropped)
        wrong = wrong.reshape(batch, model.grid, model.grid)
        wrong = wrong.repeat(model.patch_size, axis=1).repeat(model.patch_size, axis=2)
        report = RoutingReport(
            experts_per_token=jnp.broadcast_to(jnp.floor(5 * time).astype(jnp.int32)[None, :, None], (1, batch, 1)),
            balance_loss=time.mean(keepdims=True)[None],
            drop_rate=2 * time.mean(keepdims=True)[None],
            z_loss=3 * time.mean(keepdims=True)[None],
        )
        if mode == "sample":
            return Prediction(velocity, 1 - dropped, jnp.float32(0), {"experts_per_token": report.experts_per_token})
        loss, metrics = routing_losses(report, model)
        return Prediction(velocity + wrong[..., None], 1 - dropped, loss, metrics | coverage(report))

    def taken(self):
        """What the network was given since the last call of this, rows of microbatches in the order of its calls."""
        jax.effects_barrier()
        given, self.given = self.given, []
        return {name: np.concatenate([call[name] for call in given]) for name in given[0]} if given else {}
