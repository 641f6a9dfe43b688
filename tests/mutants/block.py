"""Mutants of the denoiser's blocks, conditions and head, and of the layers they are made of."""

from tests.mutants.mutant import Mutant

_DIT, _LAYERS = "ecdit/models/dit.py", "ecdit/models/layers.py"


def _dit(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/models/test_dit.py::{name}" for name in names)


def _layers(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/models/test_layers.py::{name}" for name in names)


def _tuned(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/tuned/test_fusion_boundary.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _DIT,
        "return size * seen // tokens if size * seen % tokens == 0 else size",
        "return size",
        _dit("test_where_nothing_is_dropped_as_many_images_compete_as_in_training"),
        "the held-out loss is of other groups than it says",
    ),
    Mutant(
        _DIT,
        'self.moe_output_norm = config.moe_output_norm if sparse else "sandwich"',
        "self.moe_output_norm = config.moe_output_norm",
        _dit("test_norms_stand_behind_their_branches[none]"),
        "dense blocks lose the norm behind their FFN",
    ),
    Mutant(
        _DIT,
        "x = x + gate * layer_norm(self.attention(layer_norm(x) * (1 + scale) + shift, angles))",
        "x = x + gate * self.attention(layer_norm(x) * (1 + scale) + shift, angles)",
        _dit("test_norms_stand_behind_their_branches[none]"),
    ),
    Mutant(
        _DIT,
        "x = x + self.cross_attention(layer_norm(x), text.states, text.mask)",
        "x = x + self.cross_attention(layer_norm(x), text.states, jnp.ones_like(text.mask))",
        _dit("test_the_padding_of_captions_changes_nothing"),
    ),
    Mutant(
        _DIT,
        "(normed, time) if self.decoupled else None",
        "(branch_input, time) if self.decoupled else None",
        _dit("test_a_decoupled_router_does_not_feel_the_modulation"),
    ),
    Mutant(
        _DIT,
        "x, angles = take_tokens(x, kept), take_tokens(all_angles, kept)",
        "x, angles = take_tokens(x, kept), all_angles[:, : kept.shape[1]]",
        _dit("test_the_order_of_kept_tokens_does_not_matter"),
        "kept tokens have the positions of their ranks",
    ),
    Mutant(
        _DIT,
        "gaps = places + self.mask_token[...].astype(dtype)[None, None]",
        "gaps = 0 * places + self.mask_token[...].astype(dtype)[None, None]",
        _dit("test_tokens_and_gaps_are_told_their_places"),
    ),
    Mutant(
        _DIT,
        "places = grid_positions(config.grid, config.width) * float(config.absolute_positions)",
        "places = grid_positions(config.grid, config.width)",
        _dit("test_tokens_and_gaps_are_told_their_places"),
    ),
    Mutant(
        _DIT,
        'return constrain(normed[0], "batch", None), constrain(jax.nn.silu(sum(normed)), "batch", None)',
        'return constrain(normed[0], "batch", None), constrain(jax.nn.silu(sum(parts)), "batch", None)',
        _dit("test_the_size_of_an_embedded_condition_does_not_matter"),
        "a condition whose embedding is large drowns the others",
    ),
    Mutant(
        _DIT,
        "self.caption(text.pooled.astype(dtype)),",
        "self.caption(text.states[:, 0].astype(dtype)),",
        _dit("test_every_condition_changes_the_velocity[pooled]"),
    ),
    Mutant(
        _DIT,
        "return self.head(layer_norm(x.astype(jnp.float32)) * (1 + scale) + shift)",
        "return self.head(layer_norm(x) * (1 + scale) + shift)",
        _dit("test_the_head_computes_in_float32"),
        "guidance takes differences of what bfloat16 has rounded",
    ),
    Mutant(
        _DIT,
        "jnp.array([0.0, 0.0, config.gate_init] * 2, dtype)",
        "jnp.array([0.0, 0.0, 0.0] * 2, dtype)",
        _dit("test_the_block_table_starts_with_its_gates_open"),
    ),
    Mutant(
        _DIT,
        "self.even = Block(config, text_width, config.even_ffn_multiplier if",
        "self.even = Block(config, text_width, config.ffn_multiplier if",
        _dit("test_even_blocks_of_a_dense_model_can_be_wider"),
    ),
    Mutant(
        _DIT,
        "return pair.even(x, angles, modulation, time_state, text, group_size, with_gates)",
        "return pair.even(x, angles, modulation, time_state, text, x.shape[1], with_gates)",
        _dit("test_images_of_a_group_compete_and_others_do_not"),
        "groups of several images are ignored",
    ),
    Mutant(
        "ecdit/models/attention.py",
        'self.out = param(rngs, zeros, (width, width), ("joined_kv", "embed"))',
        'self.out = param(rngs, xavier, (width, width), ("joined_kv", "embed"))',
        _dit("test_the_velocity_is_zero_at_the_start"),
        "cross-attention is not silent at the start",
    ),
    Mutant(
        _LAYERS,
        "return make(rngs)",
        "return make(nnx.Rngs(0))",
        _layers("test_a_stack_draws_every_block_anew"),
    ),
    Mutant(
        _LAYERS,
        "variance = jnp.maximum(square - jnp.square(mean), 0.0)",
        "variance = square",
        _layers("test_norms_are_those_of_float64_numpy"),
    ),
    Mutant(
        _LAYERS,
        "variance = jnp.maximum(square - jnp.square(mean), 0.0)",
        "variance = square - jnp.square(mean)",
        _layers("test_a_norm_of_a_large_constant_is_finite"),
        "rounding makes the variance of nearly constant tokens negative, and their norm NaN",
    ),
    Mutant(
        _LAYERS,
        "y = x.astype(jnp.float32)\n    # Computes both",
        "y = x\n    # Computes both",
        _layers("test_norms_compute_in_float32_and_keep_the_dtype"),
    ),
    Mutant(
        _LAYERS,
        "step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)",
        'step = jax.checkpoint(step, policy=REMAT_POLICIES["none"], prevent_cse=False)',
        _layers("test_rematerialisation_trades_memory_for_products"),
        "a model that fitted its chips does not",
    ),
    Mutant(
        "ecdit/functions.py",
        "return x * jax.nn.sigmoid(2 * u)",
        "return x * jax.nn.sigmoid(u)",
        ("tests/models/test_moe.py::test_values_and_gradients_are_those_of_float64_numpy[gather-none-expert_choice]",),
    ),
    Mutant(
        _LAYERS,
        "        if unroll > 1:\n",
        "        if unroll > 99:\n",
        _tuned("test_the_work_of_unrolled_blocks_grows_linearly_with_their_number"),
        "unrolled blocks are not kept apart",
    ),
    Mutant(
        "ecdit/tuned/fusion_boundary.py",
        "lambda x: x * 1, x)",
        "lambda x: x * 2, x)",
        _tuned("test_it_is_the_identity_and_so_is_its_gradient[nan]"),
    ),
    Mutant(
        "ecdit/tuned/fusion_boundary.py",
        "cpu=store, default=lambda x: x)",
        "default=store)",
        _tuned("test_a_tpu_computes_nothing_for_it"),
    ),
)
