"""Mutants of sampling, retrieval and routing maps."""

from tests.mutants.mutant import Mutant

_SAMPLING, _MAPS, _TABLES = (f"ecdit/sampling/{name}.py" for name in ("sampler", "routing_maps", "routing_tables"))
_RETRIEVAL = "ecdit/evaluation/retrieval.py"
_MANY, _FOLDER, _LAYOUTS = (f"ecdit/sampling/{name}.py" for name in ("many", "image_folder", "layouts"))
_LOSS, _CLIP = (f"ecdit/evaluation/{name}.py" for name in ("flow_loss", "clip_score"))
_TRAINING = "tests/ecdit_runs/test_training_run.py"
_FILES, _DRAWN = "ecdit/sampling/prompt_files.py", "ecdit/runs/sample_folder.py"


def _samples(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/system/test_sampling.py::{name}" for name in names)


def _maps(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/sampling/test_routing_maps.py::{name}" for name in names)


def _tables(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/sampling/test_routing_tables.py::{name}" for name in names)


def _passes(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/evaluation/test_passes.py::{name}" for name in names)


def _loss(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/evaluation/test_flow_loss.py::{name}" for name in names)


def _many(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/system/test_sampling_many.py::{name}" for name in names)


def _folder(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/sampling/test_image_folder.py::{name}" for name in names)


def _prompts(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/sampling/test_prompt_files.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _SAMPLING,
        'not predicts_data or config.solver in ("euler", "multistep")',
        'not predicts_data or config.solver in ("euler", "multistep", "heun")',
        (
            "tests/sampling/test_sampler.py::"
            "test_with_predicted_data_a_solver_is_refused_where_it_would_leave_noise[heun]",
        ),
    ),
    Mutant(
        _LOSS,
        "return ((images + shift) % BINS).astype(np.int32)",
        "return np.full_like(images, shift)",
        _loss("test_images_of_a_batch_are_at_different_times"),
        "images compete for experts with others at their own time, as they never do in training",
    ),
    Mutant(
        _LOSS,
        "losses[images[valid], bins[valid]] = found[valid]",
        "losses[images[valid], shift] = found[valid]",
        _loss("test_the_loss_of_a_bin_is_the_mean_over_all_images"),
        "a loss counts in the bin of another time",
    ),
    Mutant(
        _LOSS,
        "key = jax.random.fold_in(jax.random.fold_in(root, image), bin_)",
        "key = jax.random.fold_in(root, bin_)",
        _loss("test_noise_differs_by_image_and_bin"),
        "all images have one noise",
    ),
    Mutant(
        _LOSS,
        "caption_dropout=0.0, flip",
        "caption_dropout=prepared.config.caption_dropout, flip",
        _loss("test_rows_are_the_same_every_time_whole_and_with_their_captions"),
    ),
    Mutant(
        "ecdit/runs/training_run.py",
        "found = evaluator.evaluate(sampling_params(state), step, self",
        "found = evaluator.evaluate({**state.params, **state.frozen}, step, self",
        (f"{_TRAINING}::test_training_evaluates_the_ema_weights",),
        "the raw weights are evaluated and not their EMA",
    ),
    Mutant(
        "ecdit/runs/training_run.py",
        "if not evaluator.is_recorded(done):",
        "if evaluator.is_recorded(done):",
        (f"{_TRAINING}::test_a_stopped_step_is_evaluated_on_resume_once",),
        "a step at which a run was stopped is never evaluated",
    ),
    Mutant(
        _CLIP,
        'return {"cosine": mean, "torchmetrics": max(100 * mean, 0.0), "hessel": hessel}',
        'return {"cosine": mean, "torchmetrics": 100 * float(np.maximum(cosine, 0).mean()), "hessel": hessel}',
        ("tests/evaluation/test_clip_score.py::test_the_three_forms_by_hand",),
        "the score is clamped for each image, as torchmetrics does not do",
    ),
    Mutant(
        _MANY,
        "np.concatenate(parts)[places - first * size]",
        "np.concatenate(parts)[places - places[0]]",
        _many("test_an_image_is_bitwise_the_same_in_any_list", "test_the_images_are_those_of_the_one_program"),
        "images are of other captions from the second batch on",
    ),
    Mutant(
        _MANY,
        "            if number not in self._batches:\n",
        "            if True:\n",
        _many("test_each_prompt_is_encoded_once_and_the_null_caption_once"),
        "each batch encodes all of its captions again",
    ),
    Mutant(
        _MANY,
        "images += [(batch.begin + row, data[i])",
        "images += [(batch.begin + i, data[i])",
        _many("test_two_processes_write_the_files_of_one"),
        "a process writes its images under the names of another's",
    ),
    Mutant(
        _MANY,
        "place_rows(programs.mesh, (states, key_data[rows]))",
        "place_rows(programs.mesh, (states, key_data[: len(rows)]))",
        _many("test_the_images_are_those_of_the_one_program"),
        "all batches draw the noise of the first",
    ),
    Mutant(
        _MANY,
        "place = batch.begin + int(wrong[0])",
        "place = int(wrong[0])",
        _many("test_an_image_that_is_not_finite_is_named_and_not_drawn_black"),
        "the error names another image",
    ),
    Mutant(
        _MANY,
        "    if len(wrong):\n",
        "    if False:\n",
        _many("test_an_image_that_is_not_finite_is_named_and_not_drawn_black"),
        "a NaN is a black image in a folder that counts as finished",
    ),
    Mutant(
        _SAMPLING,
        "if wrong := int((~np.asarray(finite)).sum()):",
        "if wrong := 0:",
        _many("test_weights_that_are_not_finite_are_no_black_images"),
        "a score counts black images",
    ),
    Mutant(
        _DRAWN,
        "left = from_first(~np.array(whole, bool))",
        "left = np.ones(len(planned), bool)",
        _many("test_a_folder_that_was_left_is_finished_and_what_is_whole_in_it_kept"),
        "a call that goes on draws all images again",
    ),
    Mutant(
        _FOLDER,
        "            return end == len(data)\n",
        "            return True\n",
        _folder("test_an_image_is_finished_if_it_is_whole"),
        "half an image is kept for ever",
    ),
    Mutant(
        "ecdit/commands/paper.py",
        'return f"does not compare: there are no images of {\', \'.join(missing)}" if missing else ""',
        'return ""',
        ("tests/evaluation/test_paper.py::test_what_a_result_lacks_is_said_and_the_rest_of_it_read",),
        "a GenEval score of one task stands beside the paper's",
    ),
    Mutant(
        _FILES,
        'path.read_text(encoding="utf-8-sig").removesuffix("\\n").split("\\n")',
        'path.read_text(encoding="utf-8-sig").splitlines()',
        _prompts("test_a_row_of_parti_s_columns_is_a_line_to_every_editor"),
        "a prompt with a line separator is cut in two",
    ),
    Mutant(
        _CLIP,
        "wrong = np.flatnonzero(~np.isfinite(cosine).all(axis=1))",
        "wrong = []",
        ("tests/evaluation/test_clip_score.py::test_a_cosine_that_is_not_finite_is_named_by_its_image",),
    ),
    Mutant(
        _FOLDER,
        "        if zlib.crc32(data[start + 4 : end - 4]) != ",
        "        if 0 * zlib.crc32(data[start + 4 : end - 4]) > ",
        _folder("test_an_image_is_finished_if_it_is_whole"),
        "a damaged image is kept for ever",
    ),
    Mutant(
        _FOLDER,
        '_FREE = ("finished", "machines", *NOT_COMPARED)',
        '_FREE = ("finished", "machines", "set", "workdir")',
        _folder("test_a_run_that_has_moved_is_the_same_run"),
    ),
    Mutant(
        _DRAWN,
        "if differences := host_differences(_facts(planned, source)):",
        "if differences := []:",
        _many("test_hosts_that_would_draw_other_images_write_nothing"),
        "a host with another file of prompts draws them under the names of the others' images",
    ),
    Mutant(
        _DRAWN,
        'rows = "\\n".join(repr(dataclasses.astuple(one)) for one in planned)',
        'rows = ""',
        _many("test_hosts_that_would_draw_other_images_write_nothing"),
    ),
    Mutant(
        _FOLDER,
        "        check_empty(out)\n        yield\n",
        "        yield\n",
        _folder("test_a_folder_of_one_call_is_empty_and_nobody_else_s"),
        "two calls that both found a directory empty mix their files",
    ),
    Mutant(
        _FOLDER,
        "all(_is_begun_manifest(path) for path in out.iterdir())",
        "not any(out.iterdir())",
        _folder("test_a_call_that_was_killed_while_it_wrote_its_first_file_is_begun_again"),
    ),
    Mutant(
        _SAMPLING,
        "if needed > free:",
        "if needed < 0:",
        ("tests/sampling/test_sampler.py::test_arrays_that_cannot_be_held_are_refused_after_the_first_batch",),
        "routing maps of too many prompts are killed after hours",
    ),
    Mutant(
        "ecdit/runs/training_run.py",
        "            if stopped:  # in the last step",
        "            if False:  # in the last step",
        (f"{_TRAINING}::test_sigterm_in_the_last_step_is_a_finished_run",),
        "the evaluation of the last step is lost where a signal arrives in it",
    ),
    Mutant(
        _DRAWN,
        "together(functools.partial(_write, out, todo, batch))",
        "_write(out, todo, batch)",
        _many("test_where_another_process_cannot_write_its_images_this_one_ends_too"),
        "a full disk ends one process of a pod, and the others wait for it",
    ),
    Mutant(
        _FOLDER,
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        _folder("test_two_calls_do_not_draw_into_one_folder_at_once"),
        "two calls remove what the other is writing",
    ),
    Mutant(
        _LAYOUTS,
        "drawn[prompt.text] + j, prompt.name",
        "j, prompt.name",
        _prompts("test_a_prompt_that_stands_there_twice_goes_on_with_its_repeats"),
        "captions that two images share are drawn as one image twice, and FID sees fewer images than it counts",
    ),
    Mutant(
        _LAYOUTS,
        "np.concatenate(images[side * row : side * (row + 1)], axis=1)",
        "np.concatenate(images[row::side], axis=1)",
        _prompts("test_dpg_s_grids_have_the_images_in_rows"),
    ),
    Mutant(
        _FILES,
        "first.setdefault(image, caption)",
        "first[image] = caption",
        _prompts("test_each_kind_is_told_by_its_file"),
        "the last caption of a COCO image is drawn and not the first",
    ),
    Mutant(
        _SAMPLING,
        "return config.guidance.scale != 1",
        "return config.guidance.scale > 1",
        _passes("test_scale_zero_is_no_scale_one"),
    ),
    Mutant(
        _SAMPLING,
        "return config.guidance.scale != 1",
        "return True",
        _passes("test_scale_one_makes_no_unconditional_pass"),
        "sampling without guidance takes twice as long",
    ),
    Mutant(
        "ecdit/models/dit.py",
        "        return self.config.num_tokens, self.config.sampling_group",
        '        return self.config.num_tokens, "image"',
        _passes("test_a_guided_image_and_its_null_twin_are_one_batch"),
        "a model that was trained in larger groups routes by others in sampling",
    ),
    Mutant(
        _SAMPLING,
        "return combine(prediction.velocity[0::2], prediction.velocity[1::2],",
        "return combine(prediction.velocity[1::2], prediction.velocity[0::2],",
        _passes("test_the_guided_velocity_of_each_image_by_hand"),
        "guidance leads away from the caption",
    ),
    Mutant(
        _SAMPLING,
        "return jnp.stack([first, second], axis=1).reshape(2 * first.shape[0], *first.shape[1:])",
        "return jnp.concatenate([first, second]).reshape(2 * first.shape[0], *first.shape[1:])",
        _passes("test_the_guided_velocity_of_each_image_by_hand"),
        "half of the images are guided by other captions",
    ),
    Mutant(
        _SAMPLING,
        "routing = None if routing is None else routing[:, 0::2]",
        "routing = None if routing is None else routing[:, 1::2]",
        _passes("test_the_guided_velocity_of_each_image_by_hand"),
        "maps of experts are those of the null caption",
    ),
    Mutant(
        _SAMPLING,
        "rows = config.batch_size // shards * (1 if config.guidance.scale == 1 else 2)",
        "rows = config.batch_size // shards",
        ("tests/system/test_step.py::test_what_does_not_divide_is_refused_with_its_numbers",),
    ),
    Mutant(
        _SAMPLING,
        "keys = sample_keys(config.seed, prompts, repeats)",
        "keys = sample_keys(config.seed, prompts, [0] * len(prompts))",
        _passes("test_each_row_has_the_key_of_its_prompt_and_repeat"),
        "repeats of a prompt are one image",
    ),
    Mutant(
        _SAMPLING,
        "tokens[rows], null_tokens, keys[rows]",
        "tokens[rows], null_tokens, keys[: len(rows)]",
        _passes("test_each_row_has_the_key_of_its_prompt_and_repeat"),
        "images depend on the batch size",
    ),
    Mutant(
        _SAMPLING,
        "np.concatenate(parts)[: len(prompts)]",
        "np.concatenate(parts[::-1])[: len(prompts)]",
        _passes("test_each_row_has_the_key_of_its_prompt_and_repeat"),
    ),
    Mutant(
        _RETRIEVAL,
        "nearer = distances < np.take_along_axis",
        "nearer = distances <= np.take_along_axis",
        _samples("test_ranks_by_hand"),
    ),
    Mutant(
        _RETRIEVAL,
        "return (ranks < k).mean()",
        "return (ranks <= k).mean()",
        _samples("test_ranks_by_hand"),
        "R@1 is R@2",
    ),
    Mutant(
        _RETRIEVAL,
        "permutation(num_records)[:count]",
        "permutation(count)[:count]",
        _samples("test_the_fixed_choice_is_fixed_and_spread"),
        "the first records are sampled, and not a choice of all",
    ),
    Mutant(
        _RETRIEVAL,
        'guidance=dataclasses.replace(config.guidance, **fixed("sampling.guidance", guidance)),',
        "guidance=config.guidance,",
        _samples("test_the_protocol_is_the_same_for_every_run"),
        "scores of runs with other guidance are compared",
    ),
    Mutant(
        _MAPS,
        "int(np.abs(times - time).argmin())",
        "int(np.abs(times[::-1] - time).argmin())",
        _maps("test_stages_are_the_steps_that_start_nearest_to_their_times"),
        "early and late change places",
    ),
    Mutant(
        _MAPS,
        "counts[:, :, i].mean(axis=1) for i in range(counts.shape[2])",
        "counts[:, i].mean(axis=1) for i in range(counts.shape[2])",
        _maps("test_means_by_hand"),
    ),
    Mutant(
        _MAPS,
        "colour(values[row].reshape(grid, grid), top)",
        "colour(values[row].reshape(grid, grid).T, top)",
        _maps("test_a_token_is_a_square_at_its_place_under_its_layer"),
    ),
    Mutant(
        _MAPS,
        "colour(counts[step, column].reshape",
        "colour(counts[row, column].reshape",
        _maps("test_one_image_s_maps_stand_in_the_row_of_their_time_and_the_column_of_their_layer"),
        "of 50 steps the first eight are drawn, and called evenly spread",
    ),
    Mutant(
        _TABLES,
        "gates[:, -last_steps:]",
        "gates[:, :last_steps]",
        _tables("test_takings_in_the_last_step"),
        "an expert's takings are those of pure noise",
    ),
    Mutant(
        _TABLES,
        "(-found.gates, -found.tokens)",
        "(-found.tokens, -found.gates)",
        _tables("test_many_tokens_with_small_gates_come_before_one_with_a_large_gate"),
    ),
    Mutant(
        "ecdit/models/routing.py",
        "jnp.where(taken, jnp.maximum(gate, smallest), 0.0)",
        "jnp.where(taken, gate, 0.0)",
        ("tests/models/test_routing.py::test_the_zeros_among_gates_are_the_tokens_that_were_not_taken",),
    ),
    Mutant(
        _SAMPLING,
        'None, "inspect" if with_gates else "sample")',
        'None, "inspect")',
        _passes("test_scale_zero_is_no_scale_one"),
        "sampling pays for gates that nobody asked for",
    ),
    Mutant(
        _MAPS,
        "place = np.clip(values / top, 0, 1) * (len(VIRIDIS) - 1)",
        "place = np.clip(values / top, 0, 1) * len(VIRIDIS)",
        _maps("test_colours_by_hand"),
    ),
    Mutant(
        "ecdit/sampling/grids.py",
        "font = caption_font(caption)",
        "font = _pillow_font()",
        ("tests/sampling/test_grids.py::test_captions_that_no_font_covers_are_numbered_and_listed",),
        "captions in other scripts are rows of boxes",
    ),
    Mutant(
        "ecdit/runs/sample_grids.py",
        "for cell in (image, target)]",
        "for cell in (target, image)]",
        ("tests/ecdit_runs/test_sample_grids.py::test_each_caption_stands_under_the_image_that_was_drawn_of_it",),
        "the true image stands above the caption",
    ),
    Mutant(
        "ecdit/data/prepared.py",
        'made = source.example(config, "train", 0, index)',
        'made = source.example(config, "train", 0, index + 1)',
        ("tests/data/test_generated.py::test_the_shapes_config_cuts_no_caption",),
        "another row's image stands beside a sample",
    ),
    Mutant(
        "ecdit/json_lines.py",
        "place = text if is_remote(text) else str(Path(text).resolve())",
        "place = text",
        ("tests/evaluation/test_json_lines.py::test_a_result_that_would_replace_a_file_of_the_command_is_refused",),
        "a judge's answers are replaced by their score",
    ),
    Mutant(
        "ecdit/evaluation/image_files.py",
        "os.walk(folder, followlinks=True)",
        "os.walk(folder)",
        ("tests/evaluation/test_image_features.py::test_images_in_linked_folders_count_and_a_link_upwards_ends",),
        "a part of the images is left out in silence",
    ),
    Mutant(
        "ecdit/evaluation/image_files.py",
        ' or ";16" in raw',
        "",
        (
            "tests/evaluation/test_image_features.py"
            "::test_sixteen_bits_a_colour_are_refused_although_pillow_takes_them_for_eight",
        ),
    ),
    Mutant(
        "ecdit/evaluation/feature_files.py",
        "        if not found.shape or not len(found):",
        "        if False:",
        ("tests/evaluation/test_scorer_commands.py::test_a_part_of_the_features_is_not_left_out_in_silence",),
    ),
    Mutant(
        "ecdit/evaluation/geneval_colours.py",
        "if not np.isfinite(similar).all():",
        "if False:",
        (
            "tests/evaluation/test_geneval_detections.py"
            "::test_numbers_that_are_not_finite_are_named_by_their_image_and_network",
        ),
        "every object is red",
    ),
    Mutant(
        "ecdit/commands/retrieval.py",
        "asked = chosen[known_otherwise]",
        "asked = chosen",
        ("tests/system/test_sampling.py::test_a_name_that_training_has_in_no_other_style_does_not_count_for_the_copy",),
    ),
    Mutant(
        "ecdit/diffusion/solvers.py",
        "return _raised(step_times(num_steps, shift)[:-1], _growth(num_steps, churn))",
        "return step_times(num_steps, shift)[:-1]",
        ("tests/diffusion/test_solvers.py::test_call_times_are_those_at_which_a_step_first_calls_the_network",),
        "maps name times at which the network was not called",
    ),
    Mutant(
        "ecdit/runs/trained_run.py",
        "dataclasses.replace(experiment.runtime, distributed=join)",
        "dataclasses.replace(experiment.runtime, distributed=join and experiment.runtime.distributed)",
        (
            "tests/ecdit_runs/test_trained_run.py"
            "::test_processes_join_where_they_are_told_to_however_the_run_was_trained",
        ),
        "each host of a pod draws all images of a run of one host",
    ),
)
