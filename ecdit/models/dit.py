"""EC-DIT: a diffusion transformer whose even blocks are mixtures of experts (arXiv 2410.02098).

Axes: B batch, N tokens of an image, M kept tokens, L text tokens, d width, p numbers in a patch.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int, Key

from ecdit.components import Metrics, Mode, PartFlops, Prediction, TextStates, TextWidths
from ecdit.config import require
from ecdit.diffusion.flow import velocity_towards
from ecdit.models.attention import CrossAttention, SelfAttention
from ecdit.models.config import DiTConfig, check_tuned, group_size
from ecdit.models.embeddings import SINUSOID_WIDTH, grid_positions, put_tokens, rope_angles, sinusoid, take_tokens
from ecdit.models.flops import denoiser_parts, idle_expert_params
from ecdit.models.layers import Linear, Mlp, layer_norm, param, scan_stack, stack, zeros
from ecdit.models.moe import FeedForward, MixtureOfExperts, RoutingReport
from ecdit.models.routing_metrics import coverage, router_grad_norm, routing_losses
from ecdit.partitioning import constrain
from ecdit.patches import patchify, unpatchify


class Block(nnx.Module):
    """Computes x + gate norm(f(norm(x) (1 + scale) + shift)) for f = self-attention, then for f = FFN or experts.

    Cross-attention comes between the two.
    """

    def __init__(self, config: DiTConfig, text_width: int, ffn_multiplier: int | None, rngs: nnx.Rngs):
        """Makes a block with an FFN of `ffn_multiplier` times the width, or with experts if that is None."""
        sparse = ffn_multiplier is None
        self.moe_output_norm = config.moe_output_norm if sparse else "sandwich"
        width, heads, kind = config.width, config.heads, config.attention
        self.attention = SelfAttention(width, heads, config.kv_heads, rngs, kind, config.projections)
        self.cross_attention = CrossAttention(width, text_width, heads, rngs, kind, config.projections)
        if sparse:
            self.experts = MixtureOfExperts(config, rngs)
        else:
            self.feed_forward = FeedForward(config.width, ffn_multiplier * config.width, rngs)
        self.sparse, self.decoupled = sparse, config.router_input == "decoupled"
        self.table = _block_table(config, rngs) if config.block_table else None

    def __call__(
        self,
        x: Float[Array, "B N d"],
        angles: Float[Array, "B N pairs"],
        modulation: Float[Array, "B 6 d"],
        time: Float[Array, "B d"],
        text: TextStates,
        group_size: int,
        with_gates: bool = False,
    ) -> tuple[Float[Array, "B N d"], RoutingReport | None]:
        """Returns the output and, for a sparse block, the report of its routing. Only decoupled routers use `time`."""
        if self.table is not None:
            modulation = modulation + self.table[...][None]
        modulation = modulation.astype(x.dtype)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = jnp.split(modulation, 6, axis=1)
        with jax.named_scope("self_attention"):
            x = x + gate * layer_norm(self.attention(layer_norm(x) * (1 + scale) + shift, angles))
        with jax.named_scope("cross_attention"):
            x = x + self.cross_attention(layer_norm(x), text.states, text.mask)
        normed = layer_norm(x)
        branch_input = normed * (1 + ffn_scale) + ffn_shift
        with jax.named_scope("experts" if self.sparse else "ffn"):
            if self.sparse:
                decoupled = (normed, time) if self.decoupled else None
                branch, report = self.experts(branch_input, group_size, decoupled, with_gates)
            else:
                branch, report = self.feed_forward(branch_input), None
            if self.moe_output_norm == "sandwich":
                branch = layer_norm(branch)
            return constrain(x + ffn_gate * branch, "batch", None, None), report


class Pair(nnx.Module):
    """A dense block, then a sparse one, which is also dense if `config.ffn` is "dense"."""

    def __init__(self, config: DiTConfig, text_width: int, rngs: nnx.Rngs):
        self.odd = Block(config, text_width, config.ffn_multiplier, rngs)
        self.even = Block(config, text_width, config.even_ffn_multiplier if config.ffn == "dense" else None, rngs)


class DiT(nnx.Module):
    """The paper's denoiser, which predicts the velocity of a noisy latent from time, caption and micro-conditions."""

    Config: ClassVar[type] = DiTConfig

    def __init__(self, config: DiTConfig, text_widths: TextWidths, rngs: nnx.Rngs):
        self.config, text_width = config, text_widths.states
        self.patches = Linear(config.patch_dim, config.width, ("features", "embed"), rngs)
        self.time = Mlp(SINUSOID_WIDTH, config.width, rngs)
        self.caption = Mlp(text_widths.pooled, config.width, rngs)
        self.size_crop = Mlp(4 * SINUSOID_WIDTH, config.width, rngs)
        self.modulation = param(rngs, zeros, (config.width, 6, config.width), ("embed", "modulation", "mlp"))
        self.modulation_bias = param(rngs, zeros, (6, config.width), ("modulation", "small_embed"))
        self.pairs = stack(lambda rngs: Pair(config, text_width, rngs), config.depth // 2, rngs)
        if config.extra_blocks:
            self.mask_token = param(rngs, jax.nn.initializers.normal(0.02), (config.width,), ("embed",))
            self.extra = stack(
                lambda rngs: Block(config, text_width, config.ffn_multiplier, rngs), config.extra_blocks, rngs
            )
        self.head_modulation = param(rngs, zeros, (config.width, 2, config.width), ("embed", "modulation", "mlp"))
        self.head_modulation_bias = param(rngs, zeros, (2, config.width), ("modulation", "small_embed"))
        self.head = Linear(config.width, config.patch_dim, ("embed", "features"), rngs, init=zeros)

    def __call__(
        self,
        latents: Float[Array, "B h w c"],
        time: Float[Array, " B"],
        text: TextStates,
        size_crop: Float[Array, "B 4"],
        mask_keys: Key[Array, " B"] | None,
        mode: Mode,
    ) -> Prediction:
        """Predicts the velocity (see `components.Denoiser`)."""
        config = self.config
        kept, seen, loss_weights = None, config.num_tokens, jnp.ones((latents.shape[0], config.num_tokens))
        if mask_keys is not None and config.mask_ratio > 0:
            kept, seen = jax.vmap(lambda key: kept_tokens(key, config))(mask_keys), config.num_kept
            loss_weights = jax.vmap(lambda row: jnp.zeros(config.num_tokens).at[row].set(1.0))(kept)
        size = self._group_size(mode, seen)
        patches, report = self.forward(latents, time, text, size_crop, kept, size, with_gates=mode == "inspect")
        loss, metrics = jnp.float32(0.0), {}
        if report is not None and mode == "train":
            loss, metrics = routing_losses(report, config)
            metrics |= coverage(report)
        elif report is not None:
            metrics = {"experts_per_token": report.experts_per_token}
            if report.expert_gates is not None:
                metrics["expert_gates"] = report.expert_gates
        velocity = unpatchify(patches, config.patch_size, config.latent_channels)
        return Prediction(velocity, loss_weights, loss, metrics)

    def images_together(self, mode: Mode) -> int:
        """Returns the images of a group, or 1 if an image has whole groups."""
        tokens, group = self._tokens_and_group(mode)
        return max(1, group_size(group, tokens) // tokens)

    def check_layout(self, mesh: Mesh | AbstractMesh, images: int, mode: Mode) -> None:
        """Raises ConfigError if groups, heads or the attention's kernel do not fit the mesh."""
        config, tensor = self.config, mesh.shape["tensor"]
        check_tuned(config, mesh)
        tokens, group = self._tokens_and_group(mode)
        per = " per microbatch" if mode == "train" else ""
        require(
            images % self.images_together(mode) == 0,
            "model.group" if mode == "train" else "model.sampling_group",
            group,
            f"must divide a device's tokens{per}, {images} images x {tokens} tokens",
        )
        for key, count in {"model.heads": config.heads, "model.kv_heads": config.kv_heads}.items():
            require(count % tensor == 0, key, count, f"must be a multiple of mesh.tensor, {tensor}")

    def flops(self, mode: Mode, text_widths: TextWidths, text_length: int) -> tuple[PartFlops, ...]:
        """Returns the work of one image: see `models.flops` for what counts."""
        return denoiser_parts(self.config, text_widths, text_length, *self._tokens_and_group(mode))

    def idle_params(self) -> int:
        """Returns the parameters of experts that an average token does not use."""
        return idle_expert_params(self.config)

    def counts_experts(self) -> bool:
        """Returns whether there are sparse layers."""
        return self.config.ffn != "dense"

    def gradient_metrics(self, gradients: dict[str, Any]) -> Metrics:
        """Returns the norm of the routers' gradients, by layer."""
        return {"router_grad_norm": router_grad_norm(gradients)}

    def _tokens_and_group(self, mode: Mode) -> tuple[int, str]:
        """Returns the tokens of an image in the first blocks, and the group of tokens that compete for experts."""
        if mode == "train":
            return self.config.num_kept, self.config.group
        return self.config.num_tokens, self.config.sampling_group

    def _group_size(self, mode: Mode, seen: int) -> int:
        """Returns the tokens of a group where the first blocks see `seen` of each image.

        Where nothing is dropped in the mode "train", as for an evaluation, as many images compete as in training.
        """
        tokens, group = self._tokens_and_group(mode)
        size = group_size(group, tokens)
        return size * seen // tokens if size * seen % tokens == 0 else size

    def forward(
        self,
        latents: Float[Array, "B h w c"],
        time: Float[Array, " B"],
        text: TextStates,
        size_crop: Float[Array, "B 4"],
        kept: Int[Array, "B M"] | None,
        group_size: int,
        with_gates: bool = False,
    ) -> tuple[Float[Array, "B N p"], RoutingReport | None]:
        """Predicts the velocity of every patch (see `patches.patchify`), float32.

        Args:
          latents: x_t, noise at time 1.
          time: in [0, 1].
          text: the encoded caption.
          size_crop: original height and width, crop top and left, in pixels.
          kept: the tokens that the first blocks see, in any order, without repeats; None for all.
          group_size: tokens that compete for experts; divides B * M.
          with_gates: whether the report has each expert's gate for each token.

        Returns:
          The velocity, and the report of all sparse layers, stacked; None without sparse layers.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        all_angles = rope_angles(config.grid, config.head_dim, config.rope_theta)
        all_angles = jnp.broadcast_to(all_angles[None], (latents.shape[0], *all_angles.shape))
        time_state, condition = self.condition(time, text, size_crop, dtype)
        modulation = _modulate(condition, self.modulation, self.modulation_bias)
        text = text._replace(states=text.states.astype(dtype))

        places = grid_positions(config.grid, config.width) * float(config.absolute_positions)
        places = places.astype(dtype)[None]
        with jax.named_scope("head"):
            x = self.patches(patchify(latents, config.patch_size).astype(dtype)) + places
        angles = all_angles
        if kept is not None:
            x, angles = take_tokens(x, kept), take_tokens(all_angles, kept)
        x = constrain(x, "batch", None, None)

        def run_pair(pair: Pair, x: Array) -> tuple[Array, RoutingReport | None]:
            x, _ = pair.odd(x, angles, modulation, time_state, text, group_size)
            return pair.even(x, angles, modulation, time_state, text, group_size, with_gates)

        x, report = scan_stack(self.pairs, run_pair, x, config.remat, config.scan_unroll)
        if kept is not None:
            gaps = places + self.mask_token[...].astype(dtype)[None, None]
            gaps = constrain(jnp.broadcast_to(gaps, (x.shape[0], *gaps.shape[1:])), "batch", None, None)
            x = constrain(put_tokens(x, kept, gaps), "batch", None, None)
        if config.extra_blocks:

            def run_block(block: Block, x: Array) -> tuple[Array, RoutingReport | None]:
                return block(x, all_angles, modulation, time_state, text, group_size)

            x, _ = scan_stack(self.extra, run_block, x, config.remat)
        predicted = self.predicted(x, condition)
        if config.prediction == "data":
            predicted = velocity_towards(predicted, patchify(latents, config.patch_size), time)
        return predicted, report

    @jax.named_scope("conditioning")
    def condition(
        self, time: Float[Array, " B"], text: TextStates, size_crop: Float[Array, "B 4"], dtype: jnp.dtype
    ) -> tuple[Float[Array, "B d"], Float[Array, "B d"]]:
        """Returns the normed embedding of time, and SiLU of the sum of those of time, caption and micro-conditions.

        Source: arXiv 2412.07730.
        """
        sizes = sinusoid(size_crop.reshape(-1), SINUSOID_WIDTH).reshape(size_crop.shape[0], -1)
        parts = (
            self.time(sinusoid(1000.0 * time, SINUSOID_WIDTH).astype(dtype)),
            self.caption(text.pooled.astype(dtype)),
            self.size_crop(sizes.astype(dtype)),
        )
        normed = [layer_norm(part) for part in parts]
        return constrain(normed[0], "batch", None), constrain(jax.nn.silu(sum(normed)), "batch", None)

    @jax.named_scope("head")
    def predicted(self, x: Float[Array, "B N d"], condition: Float[Array, "B d"]) -> Float[Array, "B N p"]:
        """Applies the head: a modulated norm and a linear map. The result is zero at initialisation."""
        shift, scale = jnp.split(_modulate(condition, self.head_modulation, self.head_modulation_bias), 2, axis=1)
        # float32, because guidance takes differences of velocities, which bfloat16 would round away.
        return self.head(layer_norm(x.astype(jnp.float32)) * (1 + scale) + shift)


def kept_tokens(key: Key[Array, ""], config: DiTConfig) -> Int[Array, " M"]:
    """Returns a uniformly random subset of the tokens, in raster order."""
    order = jnp.argsort(jax.random.uniform(key, (config.num_tokens,)))
    return jnp.sort(order[: config.num_kept])


def _block_table(config: DiTConfig, rngs: nnx.Rngs) -> nnx.Param:
    """Makes the (shift, scale, gate) x 2 that a block adds to the modulation, 0 or `gate_init` for the gates."""

    def init(_: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.array([0.0, 0.0, config.gate_init] * 2, dtype)[:, None], shape)

    return param(rngs, init, (6, config.width), ("modulation", "small_embed"))


def _modulate(condition: Float[Array, "B d"], kernel: nnx.Param, bias: nnx.Param) -> Float[Array, "B rows d"]:
    """Returns `rows` modulation vectors, float32 because their gradient is a sum over all blocks."""
    modulation = jnp.einsum("bd,dre->bre", condition, kernel[...].astype(condition.dtype)).astype(jnp.float32)
    modulation = constrain(modulation, "batch", None, None)  # without it each use would gather tokens, which are larger
    return modulation + bias[...].astype(jnp.float32)[None]
