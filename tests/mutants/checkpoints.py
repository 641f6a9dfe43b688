"""Mutants of checkpoints: checksums, saving, reading, recovering from damage, and the loop around them."""

from tests.mutants.mutant import Mutant

_CHECKPOINT, _CHECKSUMS, _STORED, _SAVING, _RECOVERY, _COMPATIBILITY = (
    f"ecdit/checkpoints/{name}.py"
    for name in ("restore", "checksums", "arrays", "async_save", "resume", "compatibility")
)
_LOOP, _RUN = "ecdit/training/loop.py", "ecdit/runs/training_run.py"


def _sums(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/checkpoints/test_checksums.py::{name}" for name in names)


def _loop(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/ecdit_runs/test_training_run.py::{name}" for name in names)


def _recovery(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/checkpoints/test_resume.py::{name}" for name in names)


def _restored(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/ecdit_runs/test_trained_run.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _CHECKSUMS,
        "first = _scramble(words ^ _scramble(_positions(words.shape)))",
        "first = _scramble(words)",
        _sums("test_damage_that_cancels_under_odd_weights_is_found"),
        "words that change places are not found",
    ),
    Mutant(
        _CHECKSUMS,
        "second = _scramble(first + jnp.uint32(GOLDEN))",
        "second = first + jnp.uint32(GOLDEN)",
        _sums("test_by_hand"),
        "the second sum says nothing that the first one does not",
    ),
    Mutant(
        _CHECKSUMS,
        "stride = jnp.uint32((2 * axis + 1) * GOLDEN % 2**32)",
        "stride = jnp.uint32(GOLDEN)",
        _sums("test_by_hand"),
        "a transposed matrix has the same checksum",
    ),
    Mutant(
        _CHECKSUMS,
        "ordered = [arrays[name] for name in sorted(arrays)]",
        "ordered = list(arrays.values())",
        _sums("test_each_array_has_its_own_sum_in_whatever_order_they_come"),
        "arrays get each other's checksums",
    ),
    Mutant(
        _CHECKSUMS,
        "return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)",
        "return x.astype(jnp.uint32)",
        _sums("test_every_flipped_bit_changes_both_sums[float32]"),
        "what is behind the point is not looked at",
    ),
    Mutant(
        _STORED,
        "if records[name][0] != text:",
        'if records[name][0].partition("[")[0] != text.partition("[")[0]:',
        _recovery("test_an_array_that_this_run_needs_otherwise_is_no_damage"),
        "another model's checkpoints are set aside as damaged",
    ),
    Mutant(
        _STORED,
        "if digest != _digest(values):",
        "if digest not in (None, _digest(values)):",
        _recovery("test_every_flipped_bit_of_the_json_is_found"),
    ),
    Mutant(
        _STORED,
        "if stored.get(name) != text:  # Orbax would cast silently",
        "if name not in stored:  # Orbax would cast silently",
        _recovery("test_an_array_that_is_of_another_type_than_was_saved_is_damage"),
    ),
    Mutant(
        _COMPATIBILITY,
        'if phase["after"] < step]',
        'if phase["after"] <= step]',
        ("tests/test_experiment_phases.py::test_phases_that_have_not_begun_may_change",),
    ),
    Mutant(
        "ecdit/experiment.py",
        "    optimizer: OptimizerConfig\n",
        "    optimizer: OptimizerConfig = field(metadata=RESUME)\n",
        _restored("test_a_changed_key_refuses_to_resume_by_name_or_may_change"),
        "a run resumes with another optimizer, and nobody is told",
    ),
    Mutant(
        "ecdit/config.py",
        'if when not in field.metadata.get("may_change", ()):',
        'if not field.metadata.get("may_change", ()):',
        _restored("test_a_changed_key_refuses_to_resume_by_name_or_may_change"),
        "a run resumes with what only a new phase may change",
    ),
    Mutant(
        _COMPATIBILITY,
        "if not lines and saved.dataset != fingerprint:",
        "if differences and saved.dataset != fingerprint:",
        _restored("test_other_data_is_refused"),
        "a run resumes on data that was prepared anew from other images",
    ),
    Mutant(
        _CHECKPOINT,
        "LatestN(config.keep)",
        "LatestN(config.keep + 1)",
        _loop("test_keep_leaves_the_newest"),
    ),
    Mutant(
        _CHECKPOINT,
        "    if step is None:\n        return steps[-1]",
        "    if step is None or step in steps:\n        return steps[-1]",
        _restored("test_weights_of_a_step_that_is_named"),
        "a checkpoint's scores are the newest one's",
    ),
    Mutant(
        _RECOVERY,
        "for step in sorted(manager.all_steps(), reverse=True):",
        "for step in sorted(manager.all_steps()):",
        _loop(
            "test_a_run_that_dies_between_steps_resumes_without_a_gap_or_a_repeat[7]",
            "test_fewer_steps_than_saved_changes_nothing",
        ),
        "a run resumes from its oldest checkpoint",
    ),
    Mutant(
        _RECOVERY,
        'if state is None or verify == "never":',
        'if state is None or verify != "always":',
        _recovery("test_in_the_background_damage_stops_the_run_before_anything_is_saved[1]"),
        "verifying in the background verifies nothing",
    ),
    Mutant(
        _RECOVERY,
        "if len(manager.all_steps()) == 1:",
        "if len(manager.all_steps()) == 0:",
        _recovery("test_in_the_background_the_only_checkpoint_stays_and_no_run_goes_on_from_it"),
        "the next start begins at step 0",
    ),
    Mutant(
        _RECOVERY,
        "    admit(meta, step)\n",
        "    admit\n",
        _recovery("test_another_model_is_no_damage"),
        "a run resumes whatever has changed in its config",
    ),
    Mutant(
        _SAVING,
        "            self.failed_in_row = 0\n",
        "            pass\n",
        ("tests/checkpoints/test_async_save.py::test_failed_saves_are_reported_survived_and_counted",),
        "a long run ends after a few failed saves, months apart",
    ),
    Mutant(
        _LOOP,
        "hooks.saves(step) or stop",
        "hooks.saves(step)",
        _loop("test_sigterm_saves_the_running_step_and_the_same_command_goes_on"),
    ),
    Mutant(
        _RUN,
        "saves=lambda step: step % every == 0 or step == config.num_steps,",
        "saves=lambda step: step % every == 0,",
        _loop("test_keep_leaves_the_newest"),
        "the end of a run is lost",
    ),
    Mutant(
        _RUN,
        "self.experiment.next_row(int(state.step))",
        "self.experiment.next_row(0)",
        _loop("test_a_resumed_run_reads_on_where_it_stopped"),
        "a resumed run sees the first data again",
    ),
    Mutant(
        _RUN,
        "        next_row=experiment.next_row(step),",
        "        next_row=experiment.next_row(step - 1),",
        _loop("test_keep_leaves_the_newest"),
    ),
    Mutant(
        _LOOP,
        "        hooks.after_step(step)\n",
        "        pass\n",
        _loop("test_the_saver_is_asked_every_step"),
        "failed saves are told of at the next save, hours later",
    ),
    Mutant(
        "ecdit/reporting/reporter.py",
        'if values["bad_in_row"] >= self.config.max_bad_steps:',
        'if values["bad_in_row"] > self.config.max_bad_steps:',
        _loop("test_bad_steps_in_a_row_stop_the_run[4]"),
    ),
    Mutant(
        "ecdit/reporting/metrics_file.py",
        'if row is not None and row["step"] <= step}',
        'if row is not None and row["step"] < step}',
        ("tests/reporting/test_reporter.py::test_a_resumed_run_keeps_the_lines_up_to_its_step",),
    ),
    Mutant(
        "ecdit/reporting/writers.py",
        "self._write(step=start_step + 1, session_log",
        "self._write(step=start_step, session_log",
        ("tests/reporting/test_writers.py::test_a_resumed_run_hides_the_steps_that_it_does_again",),
    ),
    Mutant(
        "ecdit/training/watchdog.py",
        "self.now = phase, what, time.monotonic() + self.limits[phase]",
        'self.now = phase, what, time.monotonic() + self.limits["step"]',
        ("tests/training/test_watchdog.py::test_a_phase_that_takes_too_long_ends_the_process_by_name",),
        "a run is ended while it compiles, and after every restart again",
    ),
    Mutant(
        "ecdit/checkpoints/inspection.py",
        "elif checksum != checksums({name: restore_array(directory, tree, name, cpu)})[name]:",
        "elif checksum and not checksums({name: restore_array(directory, tree, name, cpu)})[name]:",
        ("tests/checkpoints/test_resume.py::test_verify_names_the_array_that_was_damaged",),
        "`ecdit.checkpoint verify` calls damaged checkpoints valid",
    ),
)
