"""Mutants of the optimizer, of EMA and state, and of what a step does with a bad or a split batch."""

from tests.mutants.mutant import Mutant

_OPTIMIZER, _STATE, _STEP = (f"ecdit/training/{name}.py" for name in ("optimizer", "state", "step"))


def _step(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/system/test_step.py::{name}" for name in names)


def _parts(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/training/test_step_parts.py::{name}" for name in names)


def _rates(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/training/test_optimizer.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _OPTIMIZER,
        "_BFLOAT16_DECAY = 0.99 ",
        "_BFLOAT16_DECAY = 0.999 ",
        _rates("test_impossible_values_are_refused_by_name"),
        "means of squares never fall, and updates become small",
    ),
    Mutant(
        _OPTIMIZER,
        "begin, decay = config.warmup_steps, optax",
        "begin, decay = 0, optax",
        _rates("test_cosine_by_hand"),
        "the decay begins during warm-up",
    ),
    Mutant(
        _OPTIMIZER,
        "optax.linear_schedule(1.0, config.end_factor, config.decay_steps)",
        "optax.linear_schedule(1.0, 0.0, config.decay_steps)",
        _rates("test_warmup_stable_decay_by_hand"),
    ),
    Mutant(
        _OPTIMIZER,
        "[optax.constant_schedule(1.0), decay], [begin]",
        "[optax.constant_schedule(1.0), decay], [begin + 1]",
        _rates("test_cosine_by_hand", "test_warmup_stable_decay_by_hand"),
        "the decay begins an update late",
    ),
    Mutant(
        _OPTIMIZER,
        "update * factors[max(parts, key=len)]",
        "update * factors[min(parts, key=len)]",
        _rates("test_factors_scale_the_updates_of_their_parts_alone"),
        "a part of a part has the factor of the whole",
    ),
    Mutant(
        _OPTIMIZER,
        'f"{name}/".startswith(f"{part}/")',
        "name.startswith(part)",
        _rates("test_factors_scale_the_updates_of_their_parts_alone"),
        "a part whose name begins like another one's has its factor",
    ),
    Mutant(
        "ecdit/experiment.py",
        "check_factors(experiment.optimizer, system.split(system.drawn(system.shapes()))[0])",
        "check_factors(experiment.optimizer, system.drawn(system.shapes()))",
        _rates("test_a_frozen_part_takes_no_factor"),
        "a factor of a frozen tower is accepted and does nothing",
    ),
    Mutant(
        _STEP,
        "schedule(state.step - state.bad_steps)",
        "schedule(state.step)",
        ("tests/training/test_bad_steps.py::test_the_rate_of_a_step_does_not_count_skipped_ones",),
        "after skipped steps the metric is not the rate that the step has",
    ),
    Mutant(
        _OPTIMIZER,
        "return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)",
        "return optax.chain(update, optax.clip_by_global_norm(config.clip_norm))",
        _step("test_rmsprop_by_hand"),
        "updates are clipped, not gradients: one large gradient stays in the moments",
    ),
    Mutant(
        _OPTIMIZER,
        "max(config.warmup_steps, 1))(count + 1)",
        "max(config.warmup_steps, 1))(count)",
        _step("test_warm_up_is_linear_then_constant"),
        "the first update has no learning rate",
    ),
    Mutant(
        _OPTIMIZER,
        "bias_correction=config.rmsprop_bias_correction,",
        "bias_correction=False,",
        _step("test_rmsprop_by_hand"),
    ),
    Mutant(
        _OPTIMIZER,
        "decay=config.rmsprop_decay,",
        "decay=config.rmsprop_momentum,",
        _step("test_rmsprop_by_hand"),
    ),
    Mutant(
        _OPTIMIZER,
        "schedule, config.adam_b1, config.adam_b2, config.adam_eps, weight_decay=config.weight_decay",
        "schedule, config.adam_b2, config.adam_b1, config.adam_eps, weight_decay=config.weight_decay",
        _step("test_adamw_by_hand"),
    ),
    Mutant(
        _OPTIMIZER,
        "config.adam_eps, weight_decay=config.weight_decay",
        "config.adam_eps",
        _step("test_adamw_by_hand"),
    ),
    Mutant(
        _OPTIMIZER,
        "return updates, cast(state, dtype)",
        "return updates, state",
        _step("test_moments_in_bfloat16_change_little"),
        "moments become float32 at the first step, and take twice the memory",
    ),
    Mutant(
        _STATE,
        "return TrainState(whole, params, params, frozen, moments, whole, whole, whole, system.loaded(every))",
        "return TrainState(whole, params, jax.tree.map(lambda _: whole, params), frozen, moments, whole, whole, whole)",
        _step("test_moments_and_ema_are_sharded_like_their_parameters"),
        "every chip holds the whole EMA",
    ),
    Mutant(
        _STATE,
        "return sharding if moment.shape == param.shape else whole",
        "return whole",
        _step("test_moments_and_ema_are_sharded_like_their_parameters"),
        "every chip holds all moments",
    ),
    Mutant(
        _STATE,
        '{"init": 0, "examples": 1}[use]',
        '{"init": 0, "examples": 0}[use]',
        _step("test_parameters_and_examples_have_keys_of_their_own"),
    ),
    Mutant(
        _STEP,
        "decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))",
        "decay = config.ema_decay",
        _parts("test_a_good_step_by_hand"),
        "the EMA is that of the drawn parameters for the first ten thousand steps",
    ),
    Mutant(
        _STEP,
        "decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))",
        "decay = (1 + step) / (10 + step)",
        _parts("test_the_ema_s_decay_grows_to_that_of_the_config"),
        "the EMA of a long run averages over most of it",
    ),
    Mutant(
        _STEP,
        "decay * ema + (1 - decay) * param, state.ema, new_params)",
        "decay * ema + (1 - decay) * param, state.ema, state.params)",
        _parts("test_a_good_step_by_hand"),
        "the EMA is a step behind",
    ),
    Mutant(
        _STEP,
        "finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)",
        "finite = jnp.isfinite(loss)",
        _parts("test_a_bad_step_changes_nothing_but_its_counters"),
        "a gradient that is not finite ends the run for good",
    ),
    Mutant(
        _STEP,
        "ema=gate(new_ema, state.ema),",
        "ema=new_ema,",
        _parts("test_a_bad_step_changes_nothing_but_its_counters"),
    ),
    Mutant(
        _STEP,
        "optimizer=gate(new_optimizer, state.optimizer),",
        "optimizer=new_optimizer,",
        _parts("test_a_bad_step_changes_nothing_but_its_counters"),
    ),
    Mutant(
        _STEP,
        "usual_loss=gate(usual_loss, state.usual_loss),",
        "usual_loss=usual_loss,",
        _parts("test_a_good_step_by_hand", "test_a_bad_step_changes_nothing_but_its_counters"),
        "a few spikes make spikes usual",
    ),
    Mutant(
        _STEP,
        "spike = finite & (loss > factor * state.usual_loss)",
        "spike = finite & (loss > state.usual_loss)",
        _parts("test_a_good_step_by_hand", "test_a_bad_step_changes_nothing_but_its_counters"),
    ),
    Mutant(
        _STEP,
        "mean = USUAL_LOSS_DECAY * state.usual_loss + (1 - USUAL_LOSS_DECAY) * loss",
        "mean = (1 - USUAL_LOSS_DECAY) * state.usual_loss + USUAL_LOSS_DECAY * loss",
        _parts("test_a_good_step_by_hand", "test_a_bad_step_changes_nothing_but_its_counters"),
    ),
    Mutant(
        _STEP,
        "bad_in_row=(state.bad_in_row + 1) * bad,",
        "bad_in_row=state.bad_in_row + bad,",
        _parts("test_a_good_step_by_hand"),
        "a long run with a few bad steps, weeks apart, is stopped as diverged",
    ),
    Mutant(
        _STEP,
        "return losses.mean(), metrics, jax.tree.map(lambda x: x / count, total)",
        "return losses.mean(), metrics, total",
        _parts("test_gradients_are_means_over_microbatches"),
        "gradients grow with accumulation",
    ),
    Mutant(
        "ecdit/models/dit.py",
        "return max(1, group_size(group, tokens) // tokens)",
        "return 1",
        ("tests/models/test_dit.py::test_images_of_a_group_are_said_to_belong_together",),
        "with accumulation other images compete than without",
    ),
    Mutant(
        _STEP,
        "x = x.reshape(-1, count, together, *x.shape[1:]).swapaxes(0, 1)",
        "x = x.reshape(count, -1, together, *x.shape[1:])",
        _parts("test_images_of_a_group_stay_together_and_rows_on_their_device"),
        "every step moves the batch between the devices",
    ),
    Mutant(
        "ecdit/models/routing_metrics.py",
        'loss = loss + config.balance_loss_weight * metrics["balance_loss"]',
        'loss = loss + metrics["balance_loss"]',
        _step("test_each_ffn_trains_by_changing_one_field[token_choice]"),
        "the balance loss outweighs the flow's",
    ),
    Mutant(
        "ecdit/models/routing_metrics.py",
        '"coverage_3_or_more": (counts >= 3).mean(axis=(1, 2)),',
        '"coverage_3_or_more": (counts > 3).mean(axis=(1, 2)),',
        _parts("test_coverage_by_hand"),
    ),
    Mutant(
        _STEP,
        "return jnp.where(bad.any(), jnp.argmax(bad), -1)",
        "return jnp.where(bad.any(), jnp.argmin(bad), -1)",
        _parts("test_a_bad_step_changes_nothing_but_its_counters"),
        "the wrong parameter is blamed",
    ),
)
