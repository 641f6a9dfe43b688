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
        "return renormalize(velocity, conditional)",
        "return renormalize(velocity, unconditional)",
        _guidance("test_renormalized_velocity_has_the_norm_of_the_conditional_one"),
    ),
    Mutant(
        _SOLVERS,
        "return x - slope.astype(jnp.float32) / num_steps",
        "return x + slope.astype(jnp.float32) / num_steps",
        _solvers("test_a_straight_path_is_solved_exactly"),
    ),
    Mutant(
        _SOLVERS,
        "jnp.full(x.shape[:1], 1 - step / num_steps, jnp.float32)",
        "jnp.full(x.shape[:1], 1 - step / (num_steps - 1), jnp.float32)",
        _solvers("test_times_go_from_one_down_in_equal_steps"),
    ),
    Mutant(
        _SOLVERS,
        "second = call(_step(x, first, num_steps), end)[0].astype(jnp.float32)",
        "second = call(_step(x, first, num_steps), start)[0].astype(jnp.float32)",
        _solvers("test_heun_is_exact_for_a_velocity_linear_in_time"),
    ),
    Mutant(
        _SOLVERS,
        "second = call(_step(x, first, num_steps), end)[0].astype(jnp.float32)",
        "second = call(x, end)[0].astype(jnp.float32)",
        _solvers("test_halving_the_step_shows_the_order"),
        "Heun's method loses its second order",
    ),
    Mutant(
        _SOLVERS,
        "return _integrate(lambda x, start, end: call(x, start), x, num_steps, has_aux)",
        "return _integrate(lambda x, start, end: call(x, end), x, num_steps, has_aux)",
        _solvers("test_times_go_from_one_down_in_equal_steps"),
    ),
)
