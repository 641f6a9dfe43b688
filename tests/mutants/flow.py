"""Mutants of the flow objective and of the random keys, and of how the step uses them."""

from tests.mutants.mutant import Mutant

_FILE, _STEP = "ecdit/diffusion/flow.py", "ecdit/training/step.py"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/diffusion/test_flow.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _FILE,
        "return time * noise.astype(jnp.float32) + (1 - time) * data.astype(jnp.float32)",
        "return time * data.astype(jnp.float32) + (1 - time) * noise.astype(jnp.float32)",
        _tests("test_path_begins_at_data_and_ends_at_noise"),
    ),
    Mutant(
        _FILE,
        "return noise.astype(jnp.float32) - data.astype(jnp.float32)",
        "return data.astype(jnp.float32) - noise.astype(jnp.float32)",
        _tests("test_derivative_of_the_path_is_the_velocity_target"),
    ),
    Mutant(
        _FILE,
        "jnp.maximum(time.astype(jnp.float32), LEAST_TIME)",
        "jnp.minimum(time.astype(jnp.float32), LEAST_TIME)",
        _tests("test_the_velocity_towards_the_data_is_the_target"),
    ),
    Mutant(
        _FILE,
        "LEAST_TIME = 0.05",
        "LEAST_TIME = 0.005",
        _tests("test_near_the_data_an_error_is_multiplied_by_twenty_at_most"),
    ),
    Mutant(
        _FILE,
        "return time / jnp.maximum(time, LEAST_TIME) if predicts_data else",
        "return time / jnp.maximum(time, LEAST_TIME) if not predicts_data else",
        _tests("test_right_data_has_no_loss_at_any_time_and_an_error_counts_twenty_times_at_most"),
    ),
    Mutant(
        "ecdit/training/step.py",
        "velocity_target(latents, noise) * target_scale(time, system.config.predicts_data)[:, None, None, None]",
        "velocity_target(latents, noise)",
        ("tests/training/test_step_parts.py::test_near_the_data_the_loss_is_of_the_network_s_error_alone",),
        "near the data, training pulls the prediction away from it",
    ),
    Mutant(
        "ecdit/evaluation/flow_loss.py",
        "- velocity_target(latents, noise) * scale",
        "- velocity_target(latents, noise)",
        ("tests/evaluation/test_flow_loss.py::test_the_target_of_predicted_data_is_that_of_training",),
    ),
    Mutant(
        "ecdit/models/dit.py",
        'if config.prediction == "data":',
        'if config.prediction == "image":',
        ("tests/models/test_dit.py::test_the_whole_model_is_that_of_float64_numpy[large]",),
        "a predicted image is taken for a velocity",
    ),
    Mutant(
        _FILE,
        "jax.nn.sigmoid(config.time_mean + config.time_std *",
        "jax.nn.sigmoid(-config.time_mean + config.time_std *",
        _tests("test_times_have_logit_normal_quantiles"),
        "a shift towards noise becomes one towards data",
    ),
    Mutant(
        _FILE,
        "config.time_std * jax.random.normal(key, (), jnp.float32)",
        "config.time_std**2 * jax.random.normal(key, (), jnp.float32)",
        _tests("test_times_have_logit_normal_quantiles"),
    ),
    Mutant(
        _FILE,
        "return kept + dropped_token_weight * _mean_square(error, 1 - weights)",
        "return kept + dropped_token_weight * _mean_square(error, jnp.ones_like(kept_mask))",
        _tests("test_loss_by_hand"),
    ),
    Mutant(
        _FILE,
        "num_elements = jnp.sum(weights, axis=-1, dtype=jnp.float32) * error.shape[-1]",
        "num_elements = jnp.float32(error.shape[-2] * error.shape[-1])",
        _tests("test_loss_by_hand"),
        "the loss falls with the share of masked tokens",
    ),
    Mutant(
        _FILE,
        "/ jnp.where(num_elements > 0, num_elements, 1)",
        "/ num_elements",
        _tests("test_a_mean_over_no_tokens_is_zero"),
    ),
    Mutant(
        _FILE,
        "if dropped_token_weight == 0:",
        "if dropped_token_weight < 0:",
        _tests("test_weight_zero_ignores_dropped_tokens"),
    ),
    Mutant(
        _FILE,
        "error = predicted.astype(jnp.float32) - target.astype(jnp.float32)",
        "error = (predicted - target.astype(predicted.dtype)).astype(jnp.float32)",
        _tests("test_loss_is_computed_in_float32"),
    ),
    Mutant(
        _FILE,
        "return jax.random.fold_in(jax.random.fold_in(key, step), row)",
        "return jax.random.fold_in(key, step + row)",
        _tests("test_example_keys_differ_by_seed_step_row_and_use"),
        "row n of a step has the noise of row n - 1 of the next one",
    ),
    Mutant(
        _FILE,
        "jax.random.fold_in(root, words[0]), words[1]), repeat)",
        "jax.random.fold_in(root, words[0]), words[0]), repeat)",
        _tests("test_key_recipe_is_the_documented_one"),
    ),
    Mutant(
        _FILE,
        'np.frombuffer(digests, dtype=">u4")',
        'np.frombuffer(digests, dtype="<u4")',
        _tests("test_key_recipe_is_the_documented_one"),
        "images of a seed and a prompt are not those of other versions",
    ),
    Mutant(
        _FILE,
        "root = jax.random.key(seed, impl=SAMPLE_KEY_IMPL)",
        "root = jax.random.key(seed)",
        _tests("test_sample_keys_do_not_depend_on_the_default_generator"),
    ),
    Mutant(
        "ecdit/models/dit.py",
        "return jnp.sort(order[: config.num_kept])",
        "return jnp.arange(config.num_kept)",
        ("tests/system/test_step.py::test_kept_tokens_are_a_uniform_sorted_subset",),
        "the lower part of every image is never seen by the first blocks",
    ),
    Mutant(
        "ecdit/models/dit.py",
        "order = jnp.argsort(jax.random.uniform(key, (config.num_tokens,)))",
        "order = jax.random.randint(key, (config.num_tokens,), 0, config.num_tokens)",
        ("tests/system/test_step.py::test_kept_tokens_are_a_uniform_sorted_subset",),
        "tokens are kept twice",
    ),
)
