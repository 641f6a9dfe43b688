"""Mutants of guidance and of the solvers."""

from tests.mutants.mutant import Mutant

_GUIDANCE, _SOLVERS = "ecdit/diffusion/guidance.py", "ecdit/diffusion/solvers.py"


def _guidance(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/diffusion/test_guidance.py::{name}" for name in names)


def _solvers(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/diffusion/test_solvers.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _GUIDANCE,
        "return unconditional + scale * (conditional - unconditional)",
        "return conditional + scale * (conditional - unconditional)",
        _guidance("test_guidance_by_hand"),
        "the scale is that of arXiv 2207.12598, one more than it says",
    ),
    Mutant(
        _GUIDANCE,
        "unconditional = unconditional.astype(jnp.float32)\n",
        "conditional = conditional.astype(unconditional.dtype)\n",
        _guidance("test_bfloat16_velocities_are_combined_in_float32"),
    ),
    Mutant(
        _GUIDANCE,
        "if scale == 1:",
        "if scale == 0:",
        _guidance("test_scale_one_is_the_conditional_model_bitwise", "test_scale_zero_is_the_unconditional_model"),
    ),
    Mutant(
        _GUIDANCE,
        "ratio = _norm(conditional) / jnp.where(norm > 0, norm, 1)",
        "ratio = norm / jnp.where(norm > 0, _norm(conditional), 1)",
        _guidance("test_renormalized_velocity_has_the_norm_of_the_conditional_one"),
    ),
    Mutant(
        _GUIDANCE,
        "jnp.where(norm > 0, norm, 1)",
        "norm",
        _guidance("test_a_velocity_of_norm_zero_stays_zero"),
    ),
    Mutant(
        _GUIDANCE,
        "axes = tuple(range(1, velocity.ndim))",
        "axes = tuple(range(velocity.ndim))",
        _guidance("test_renormalization_of_an_image_does_not_depend_on_its_neighbours"),
    ),
    Mutant(
        _GUIDANCE,
        "velocity = renormalize(velocity, conditional)",
        "velocity = renormalize(velocity, unconditional)",
        _guidance("test_renormalized_velocity_has_the_norm_of_the_conditional_one"),
    ),
    Mutant(
        _GUIDANCE,
        "return jnp.where(inside, velocity, conditional.astype(jnp.float32))",
        "return jnp.where(inside, conditional.astype(jnp.float32), velocity)",
        _guidance("test_outside_the_interval_the_velocity_is_the_conditional_one"),
    ),
    Mutant(
        _GUIDANCE,
        "inside = (time >= config.interval_low) & (time <= config.interval_high)",
        "inside = time <= config.interval_high",
        _guidance("test_outside_the_interval_the_velocity_is_the_conditional_one"),
    ),
    Mutant(
        _SOLVERS,
        "return x + length * slope.astype(jnp.float32)",
        "return x - length * slope.astype(jnp.float32)",
        _solvers("test_a_straight_path_is_solved_exactly"),
    ),
    Mutant(
        _SOLVERS,
        "uniform = 1 - np.arange(num_steps + 1) / num_steps",
        "uniform = 1 - np.arange(num_steps + 1) / (num_steps + 1)",
        _solvers("test_times_go_from_one_down_in_equal_steps"),
    ),
    Mutant(
        _SOLVERS,
        "return shift * uniform / (1 + (shift - 1) * uniform)",
        "return uniform / (shift + (1 - shift) * uniform)",
        _solvers("test_a_shift_gives_noise_more_steps"),
        "a shift gives data more steps in place of noise",
    ),
    Mutant(
        _SOLVERS,
        "second = call(_moved(x, first, length), end)[0].astype(jnp.float32)",
        "second = call(_moved(x, first, length), start)[0].astype(jnp.float32)",
        _solvers("test_heun_is_exact_for_a_velocity_linear_in_time"),
    ),
    Mutant(
        _SOLVERS,
        "second = call(_moved(x, first, length), end)[0].astype(jnp.float32)",
        "second = call(x, end)[0].astype(jnp.float32)",
        _solvers("test_halving_the_step_shows_the_order"),
        "Heun's method loses its second order",
    ),
    Mutant(
        _SOLVERS,
        "slope, aux = call(x, step.start)\n        return _moved",
        "slope, aux = call(x, step.end)\n        return _moved",
        _solvers("test_times_go_from_one_down_in_equal_steps"),
    ),
    Mutant(
        _SOLVERS,
        "extrapolated = slope + step.extrapolation * (slope - before)",
        "extrapolated = slope + 0.5 * (slope - before)",
        _solvers("test_multistep_by_hand_on_steps_of_two_lengths"),
        "the multistep solver loses its order where times are shifted",
    ),
    Mutant(
        _SOLVERS,
        "return (_moved(x, extrapolated, step.length), slope), aux",
        "return (_moved(x, extrapolated, step.length), extrapolated), aux",
        _solvers("test_halving_the_step_shows_the_order"),
    ),
    Mutant(
        _SOLVERS,
        "raised = (x + t * math.sqrt(gamma * (2 + gamma)) * noise) / (1 + gamma * t)",
        "raised = (x + t * math.sqrt(gamma) * noise) / (1 + gamma * t)",
        _solvers("test_added_noise_gives_the_distribution_of_the_later_time"),
        "churned samples are too smooth",
    ),
    Mutant(
        _SOLVERS,
        "jax.random.fold_in(key, step.number)",
        "jax.random.fold_in(key, 0)",
        _solvers("test_each_step_adds_noise_of_its_own"),
        "the same noise is added in all steps",
    ),
    Mutant(
        _SOLVERS,
        "return _heun_step(call, x, start, step.end, step.end[0] - start[0])",
        "return _heun_step(call, x, start, step.end, step.length)",
        _solvers("test_stochastic_heun_draws_the_data_s_distribution"),
    ),
)
