"""Mutants of the mixture of experts: dispatch, gates, combine, and the experts' matrices on several chips."""

from tests.mutants.mutant import Mutant

_FILE, _TUNED = "ecdit/models/moe.py", "ecdit/tuned/experts.py"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/models/test_moe.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _FILE,
        "outputs = (outputs.astype(jnp.float32) * gate[..., None]).astype(outputs.dtype)",
        "outputs = (outputs.astype(jnp.float32) * (gate[..., None] > 0)).astype(outputs.dtype)",
        _tests("test_equal_experts_are_one_feed_forward_times_the_gates"),
        "the gates only switch, and the router gets no gradient",
    ),
    Mutant(
        _FILE,
        'output = output + (layer_norm(shared) if config.moe_output_norm == "expert" else shared)',
        "output = output + shared",
        _tests("test_shared_experts_work_on_every_token_without_a_gate"),
    ),
    Mutant(
        _FILE,
        "jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean(axis=-1),",
        "jax.nn.logsumexp(logits, axis=-1).mean(axis=-1),",
        _tests("test_the_z_loss_by_hand"),
    ),
    Mutant(
        _FILE,
        "_project_float32(time[:, None], self.time_router)",
        "_project_float32(time[:, None], self.router)",
        _tests("test_a_decoupled_router_sees_time_and_unmodulated_tokens"),
    ),
    Mutant(
        _FILE,
        "return _project_float32(tokens, self.router) +",
        "return _project_float32(x, self.router) +",
        _tests("test_a_decoupled_router_sees_time_and_unmodulated_tokens"),
    ),
    Mutant(
        _FILE,
        'return jnp.einsum("bnd,de->bne", x.astype(jnp.float32), kernel,',
        'return jnp.einsum("bnd,de->bne", x, kernel.astype(x.dtype),',
        ("tests/models/test_routing.py::test_the_router_of_a_bfloat16_layer_computes_in_float32",),
        "near-ties are routed by bfloat16's rounding",
    ),
    Mutant(
        _FILE,
        "routing = renormalize_gates(routing, group_size, config.route_scale)",
        "routing = renormalize_gates(routing, group_size, 1.0)",
        _tests("test_renormalized_branches_are_means_of_experts_times_the_scale"),
    ),
    Mutant(
        _FILE,
        "else expert_capacity(group_size, config.num_experts, TOKEN_CHOICES)",
        "else expert_capacity(group_size, config.num_experts, config.capacity_factor)",
        _tests("test_token_choice_has_a_slot_for_each_choice_whatever_the_capacity_factor"),
        "token choice drops more tokens, or fewer, by a field that is expert choice's",
    ),
    Mutant(
        _FILE,
        "slots = tokens.at[_flat_index(routing, group_size)].add(y.astype(jnp.float32))",
        "slots = tokens.at[_flat_index(routing, group_size)].set(y.astype(jnp.float32))",
        _tests("test_experts_that_take_all_are_the_softmax_mixture"),
        "of a token's experts the last one wins",
    ),
    Mutant(
        _FILE,
        "slots = tokens.at[_flat_index(routing, group_size)].add(y.astype(jnp.float32))",
        "slots = tokens.astype(y.dtype).at[_flat_index(routing, group_size)].add(y)",
        _tests("test_scatter_adds_in_float32"),
    ),
    Mutant(
        _FILE,
        "first = jnp.arange(routing.index.shape[0], dtype=jnp.int32) * group_size",
        "first = jnp.zeros(routing.index.shape[0], dtype=jnp.int32)",
        _tests("test_values_and_gradients_are_those_of_float64_numpy[gather-none-expert_choice]"),
        "every group takes its tokens from the first one",
    ),
    Mutant(
        _FILE,
        "chosen = jax.nn.one_hot(routing.index, group_size, dtype=y.dtype) * routing.taken[..., None].astype(y.dtype)",
        "chosen = jax.nn.one_hot(routing.index, group_size, dtype=y.dtype) * routing.gate[..., None].astype(y.dtype)",
        _tests("test_values_and_gradients_are_those_of_float64_numpy[one_hot-none-expert_choice]"),
        "the gate is applied twice, with one of the two dispatches only",
    ),
    Mutant(
        _FILE,
        'hidden = constrain(gelu(named(hidden, "expert_hidden")), "experts", "expert_groups", "mlp")',
        'hidden = constrain(named(hidden, "expert_hidden"), "experts", "expert_groups", "mlp")',
        _tests("test_values_and_gradients_are_those_of_float64_numpy[gather-none-expert_choice]"),
        "experts are linear",
    ),
    Mutant(
        _TUNED,
        'hidden = constrain(gelu(named(hidden, "expert_hidden")), *_HIDDEN)',
        'hidden = constrain(named(hidden, "expert_hidden"), *_HIDDEN)',
        ("tests/tuned/test_experts.py::test_a_layer_with_scattered_gradients_is_the_plain_one",),
        "experts are linear, on TPUs alone",
    ),
    Mutant(
        _FILE,
        "grouped = x.reshape(-1, group_size, x.shape[-1])",
        "grouped = x.reshape(group_size, -1, x.shape[-1]).swapaxes(0, 1)",
        _tests("test_values_and_gradients_are_those_of_float64_numpy[gather-none-expert_choice]"),
        "experts get other tokens than the router chose for them",
    ),
    Mutant(
        _TUNED,
        'return jnp.einsum("eti,eto->eio", inputs, gradient), gradient',
        'return jnp.einsum("eti,eto->eio", inputs, gradient) / inputs.shape[1], gradient',
        ("tests/tuned/test_experts.py::test_a_layer_with_scattered_gradients_is_the_plain_one",),
        "a mean in place of a sum: experts learn at another rate than all else",
    ),
    Mutant(
        _TUNED,
        "return jax.lax.psum(part, others), gradient",
        "return part, gradient",
        ("tests/tuned/test_experts.py::test_experts_gradients_are_summed_over_all_chips_with_slots_of_theirs",),
        "replicas of an expert drift apart: each gets the gradient of its own slots",
    ),
    Mutant(
        _TUNED,
        'others = tuple(axis for axis in AXIS_RULES["expert_groups"] if axis != "fsdp")',
        'others = ("slices",)',
        ("tests/tuned/test_experts.py::test_experts_gradients_are_summed_over_all_chips_with_slots_of_theirs",),
    ),
    Mutant(
        "ecdit/models/layers.py",
        "in_axis=-2, out_axis=-1, batch_axis=0)",
        "in_axis=-2, out_axis=-1)",
        _tests("test_init_draws_every_expert_as_if_it_were_alone"),
        "experts start smaller, the more there are",
    ),
    Mutant(
        "ecdit/tuned/saved_product.py",
        "return jnp.einsum(forms[1], gradient, kernel), jnp.zeros_like(saved), of_kernel",
        "return jnp.einsum(forms[1], gradient, kernel), jnp.einsum(forms[1], gradient, kernel), of_kernel",
        ("tests/tuned/test_saved_product.py::test_a_product_that_saves_what_it_multiplies_has_einsum_s_gradients",),
        "the gradient of what comes in counts twice",
    ),
)
