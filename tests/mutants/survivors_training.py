"""Mutants of training, sampling, checkpoints and plans after which a run goes on and learns, or nearly so.

Losses that fall, or that are equal on all meshes, do not show them: their tests compare with numbers by hand.
"""

from tests.mutants.mutant import Mutant

_STEP = "tests/training/test_step.py"
_DRAWING = "tests/sampling/test_sampler.py"
_IMAGES = "tests/sampling/test_grids.py"
_OPTIMIZER = "tests/system/test_step.py"
_CACHE = "tests/planning/test_cache.py::test_whatever_changes_a_plan_makes_it_anew_and_the_old_one_stays"
_VERSIONS = "tests/planning/test_cache.py::test_another_version_of_a_library_or_of_this_code_makes_plans_anew"
_FLIPPED_WEIGHT = "tests/ecdit_runs/test_trained_run.py::test_a_flipped_bit_of_any_weight_is_noticed"
_FLIPPED_ARRAY = "tests/checkpoints/test_resume.py::test_a_flipped_bit_of_any_array_is_found_by_each_way_to_verify"
_KEYS = f"{_STEP}::test_each_example_has_the_noise_time_and_mask_of_its_own_keys_at_this_step"
_BY_HAND = f"{_STEP}::test_loss_and_metrics_by_hand_are_those_of_the_whole_batch"
_USUAL_LOSS = (
    "tests/test_experiment_phases.py::test_a_new_phase_begins_without_a_usual_loss_and_a_resumed_one_goes_on_with_it"
)
_EMA_IMAGES = "tests/ecdit_runs/test_training_run.py::test_images_are_drawn_with_the_ema_weights"
_SAMPLES = "tests/ecdit_runs/test_sample_grids.py::test_each_caption_stands_under_the_image_that_was_drawn_of_it"


def _step(old: str, new: str, *tests: str, why: str = "") -> Mutant:
    return Mutant("ecdit/training/step.py", old, new, tests, why)


def _sampling(old: str, new: str, test: str) -> Mutant:
    return Mutant("ecdit/sampling/sampler.py", old, new, (f"{_DRAWING}::{test}",))


def _plan_follows_from(new: str, test: str) -> Mutant:
    old = (
        "follows_from = [to_dict(experiment), user_files(experiment.denoiser), "
        "target.name, what, compiler, code_digest()]"
    )
    return Mutant(
        "ecdit/planning/cache.py", old, f"follows_from = [{new}]", (test,), "an old plan is told as a new one"
    )


MUTANTS = (
    # Damage of a checkpoint.
    Mutant(
        "ecdit/checkpoints/restore.py",
        "    check_sums(directory, records, checksums(flat_arrays(values)))\n",
        "",
        (f"{_FLIPPED_WEIGHT}[frozen0]",),
        "images and new runs are made of damaged weights",
    ),
    Mutant(
        "ecdit/checkpoints/restore.py",
        "checksums(flat_arrays(values))",
        'checksums(flat_arrays({"ema": values["ema"]}))',
        (f"{_FLIPPED_WEIGHT}[frozen1]",),
        "a damaged text tower is loaded",
    ),
    Mutant(
        "ecdit/checkpoints/restore.py",
        "    check_sums(step_directory(manager, step), meta.arrays, checksums(state_arrays(state)))\n",
        "",
        (_FLIPPED_ARRAY,),
    ),
    Mutant(
        "ecdit/checkpoints/resume.py",
        "checksums(arrays)) or True",
        '{k: v for k, v in checksums(arrays).items() if "optimizer/" not in k}) or True',
        (_FLIPPED_ARRAY,),
        "a run goes on with damaged moments",
    ),
    Mutant(
        "ecdit/checkpoints/resume.py",
        "finish_checksums(names, running.pop()))",
        '{k: v for k, v in finish_checksums(names, running.pop()).items() if "optimizer/" not in k})',
        (_FLIPPED_ARRAY,),
        "the same, checked in the background",
    ),
    Mutant(
        "ecdit/checkpoints/arrays.py",
        "for name, found in sums.items() if records",
        "for name, found in list(sums.items())[1:] if records",
        (_FLIPPED_ARRAY,),
        "the first array is not compared",
    ),
    # What the network is given, and what is made of its answer.
    _step(
        "model.denoiser(noisy, time, text,",
        "model.denoiser(noisy, 1 - time, text,",
        f"{_STEP}::test_a_network_that_knows_the_data_has_no_loss[0]",
        why="it trains, and sampling, which tells t, draws nonsense",
    ),
    _step('keys.mask, "train")', 'keys.noise, "train")', f"{_KEYS}[0]"),
    _step("jnp.float32))(keys.noise)", "jnp.float32))(keys.mask)", f"{_KEYS}[0]"),
    _step("flow))(keys.time)", "flow))(keys.noise)", f"{_KEYS}[0]"),
    _step('"examples"), state.step, rows)', '"examples"), 0 * state.step, rows)', f"{_KEYS}[3]"),
    _step('"examples"), state.step, rows)', '"examples"), state.step, 0 * rows)', f"{_KEYS}[0]"),
    _step('run_key(config.seed, "examples")', 'run_key(0, "examples")', f"{_KEYS}[0]"),
    _step("flow.dropped_token_weight).mean()", "0.0).mean()", f"{_BY_HAND}[whole]"),
    Mutant(
        "ecdit/models/dit.py",
        "at[row].set(1.0))(kept)",
        "at[row].set(1.0))(kept) * 0 + 1",
        ("tests/models/test_dit.py::test_a_prediction_is_of_the_tokens_that_its_keys_keep",),
        "the loss counts tokens that the first blocks have not seen",
    ),
    Mutant(
        "ecdit/models/dit.py",
        "size = self._group_size(mode, seen)",
        'size = self._group_size("sample", seen)',
        ("tests/models/test_dit.py::test_a_prediction_is_of_the_tokens_that_its_keys_keep",),
    ),
    _step("else x.mean(axis=0) for name", "else x[-1] for name", f"{_BY_HAND}[halved]"),
    _step("return losses.mean(), metrics", "return losses[-1], metrics", f"{_BY_HAND}[halved]"),
    _step("lambda x: x / count, total)", "lambda x: x, total)", f"{_BY_HAND}[halved]"),
    _sampling(
        "model.denoiser(x, time, text,",
        "model.denoiser(x, 1 - time, text,",
        "test_a_network_that_knows_the_image_draws_it",
    ),
    _sampling(
        "[config.original_size, config.original_size, 0, 0]",
        "[0, 0, config.original_size, config.original_size]",
        "test_micro_conditions_are_the_original_size_and_no_crop_in_the_order_of_the_data",
    ),
    _sampling(
        'tokenize(prompts), tokenize([""])',
        'tokenize(prompts), 0 * tokenize([""])',
        "test_each_image_is_of_its_prompt_and_the_null_caption_is_the_empty_one_with_its_end",
    ),
    _sampling(
        "sampler(params, tokens[rows], null_tokens",
        "sampler(params, tokens[np.roll(rows, 1)], null_tokens",
        "test_each_image_is_of_its_prompt_and_the_null_caption_is_the_empty_one_with_its_end",
    ),
    *(
        Mutant(
            "ecdit/models/dit.py",
            old,
            new,
            ("tests/models/test_conditions.py",),
            "weights that this code trained mean another thing to it than those of DiT's convention",
        )
        for old, new in (
            ("sinusoid(1000.0 * time, ", "sinusoid(1000.0 * (1 - time), "),
            ("sinusoid(size_crop.reshape(-1), ", "sinusoid(size_crop[:, ::-1].reshape(-1), "),
        )
    ),
    # The optimizer's options.
    *(
        Mutant(
            "ecdit/training/optimizer.py",
            f"{name}=config.rmsprop_{name},",
            f"{name}={value},",
            (f"{_OPTIMIZER}::{test}",),
        )
        for name, value, test in (
            ("eps_in_sqrt", "True", "test_rmsprop_s_eps_is_where_the_config_says"),
            ("eps", "1e-8", "test_rmsprop_s_eps_is_where_the_config_says"),
            (
                "bias_correction",
                "True",
                "test_rmsprop_s_first_step_is_ten_times_too_long_without_bias_correction",
            ),
        )
    ),
    # A new phase.
    Mutant(
        "ecdit/runs/training_run.py",
        "usual_loss=state.usual_loss + np.inf",
        "usual_loss=state.usual_loss",
        (f"{_USUAL_LOSS}[3]",),
        "with spike_factor, harder images are skipped until the run stops as diverged",
    ),
    Mutant(
        "ecdit/runs/training_run.py",
        "if first == phase.after + 1:",
        "if first >= phase.after + 1:",
        (f"{_USUAL_LOSS}[4]",),
        "a resumed run differs from one that was not stopped",
    ),
    # Images with the weights and captions that they are said to have.
    Mutant(
        "ecdit/training/state.py",
        "return {**state.ema, **state.frozen, **state.loaded}",
        "return {**state.params, **state.frozen, **state.loaded}",
        (_EMA_IMAGES,),
    ),
    Mutant(
        "ecdit/runs/training_run.py",
        "images.write(sampling_params(state), step, self",
        "images.write({**state.params, **state.frozen}, step, self",
        (_EMA_IMAGES,),
    ),
    Mutant(
        "ecdit/runs/sample_grids.py",
        "beside_targets(images, prompts, ",
        "beside_targets(images, prompts[1:] + prompts[:1], ",
        (_SAMPLES,),
    ),
    Mutant(
        "ecdit/runs/sample_grids.py",
        "draw_maps(images, prompts, ",
        "draw_maps(images, prompts[1:] + prompts[:1], ",
        (f"{_SAMPLES}[expert_choice]",),
    ),
    Mutant(
        "ecdit/sampling/grids.py",
        "zip(images, captions, strict=True)",
        "zip(images, [*captions[1:], captions[0]], strict=True)",
        (f"{_IMAGES}::test_every_image_of_a_grid_has_its_own_caption",),
    ),
    Mutant(
        "ecdit/sampling/routing_maps.py",
        "captions[int(record)], shown)",
        "captions[record - 1], shown)",
        (f"{_IMAGES}::test_every_row_of_the_maps_has_its_own_image_counts_and_caption",),
    ),
    Mutant(
        "ecdit/sampling/image_folder.py",
        "[one.prompt for one in first], out",
        "[one.prompt for one in planned[1:] + planned[:1]], out",
        (f"{_IMAGES}::test_what_the_sample_command_writes_belongs_together",),
    ),
    # What a plan that is kept follows from.
    _plan_follows_from("to_dict(experiment) | {'mesh': 0}, {}, target.name, what, compiler, code_digest()", _CACHE),
    _plan_follows_from("to_dict(experiment), {}, what, compiler, code_digest()", _CACHE),
    _plan_follows_from("to_dict(experiment), {}, target.name, compiler, code_digest()", _CACHE),
    _plan_follows_from("to_dict(experiment), {}, target.name, what, code_digest()", _VERSIONS),
    _plan_follows_from("to_dict(experiment), {}, target.name, what, compiler", _VERSIONS),
)
