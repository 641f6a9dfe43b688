"""Mutants of a run's safeguards: locks, lost checkpoints, records, read errors, hosts, replays."""

from tests.mutants.mutant import Mutant

_READ, _COMPATIBLE = "ecdit/checkpoints/read_errors.py", "ecdit/checkpoints/compatibility.py"
_LOCK, _LOST, _LEDGER = (f"ecdit/runs/{name}.py" for name in ("lock", "lost_checkpoints", "ledger"))
_TOKENIZER, _WEIGHTS = "ecdit/runs/kept_tokenizer.py", "ecdit/interop/weights.py"
_RESTARTS = "test_a_run_that_is_stopped_in_an_outage_restarts_and_goes_on_when_it_is_over"
_BOTH = "test_an_outage_of_one_of_two_processes_restarts_both"
_DRAWN_MEANWHILE = "test_in_a_bucket_nothing_is_written_under_a_lease_that_has_ended_while_it_was_drawn"
_REPLAY, _RUN, _LOOP = "ecdit/runs/replay.py", "ecdit/runs/training_run.py", "ecdit/training/loop.py"


def _tests(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _RUN,
        "        run.check_restored()  # where no step follows a restored checkpoint, nothing else would\n",
        "",
        _tests("checkpoints/test_resume", "test_in_the_background_damage_stops_a_run_that_has_no_step_left[draws]"),
        "a run whose last checkpoint is damaged says that it is done",
    ),
    Mutant(
        "ecdit/runs/workload.py",
        "read_prompts = functools.cache(prompt_lines)",
        "read_prompts = prompt_lines",
        _tests("system/test_evaluation_in_training", "test_prompts_are_read_once_for_all_phases"),
        "processes draw different prompts, and wait for each other",
    ),
    Mutant(
        _COMPATIBLE,
        "for key, value in phase[\"changes\"].items() if key not in may_change}}",
        "for key, value in phase[\"changes\"].items()}}",
        _tests("test_experiment_phases", "test_what_may_change_on_a_resume_may_change_in_a_phase_that_has_begun"),
    ),
    Mutant(
        _READ,
        "    if isinstance(error, _FAULTS) or (number is not None and number not in _MISSING):",
        "    if isinstance(error, _FAULTS):",
        _tests("checkpoints/test_read_errors", "test_only_data_that_is_missing_or_cannot_be_decoded_is_damage"),
        "a valid checkpoint on a failing disk is moved away",
    ),
    Mutant(
        _READ,
        "            if is_damage(error) and _exists(directory):",
        "            if is_damage(error):",
        _tests("checkpoints/test_read_errors", "test_what_is_raised_names_the_checkpoint"),
        "a disk that is unmounted makes every checkpoint damaged",
    ),
    Mutant(
        "ecdit/checkpoints/resume.py",
        "    if found := anywhere(fault):",
        "    if (found := anywhere(fault)) and damaged:",
        _tests("checkpoints/test_read_errors", "test_a_disk_that_cannot_be_read_moves_no_checkpoint"),
    ),
    Mutant(
        "ecdit/checkpoints/async_save.py",
        "OutageError(reason) if is_temporary(error) else None",
        "None",
        _tests("ecdit_runs/test_outages", _RESTARTS),
        "a run that is stopped in an outage is never restarted",
    ),
    Mutant(
        "ecdit/storage.py",
        '    if not outage or _package(error) == "jax":',
        "    if not isinstance(error, UserError):",
        _tests("ecdit_runs/test_outages", _RESTARTS),
        "a bucket that is away while a run starts ends it with a traceback and code 1",
    ),
    Mutant(
        "ecdit/storage.py",
        "for one in causes(error))",
        "for one in chain(error))",
        _tests(
            "commands/test_command_line", "test_a_bug_that_is_met_while_an_outage_is_handled_keeps_its_traceback"
        ),
        "a bug in the handling of an outage has no traceback, and the run is restarted again and again",
    ),
    Mutant(
        "ecdit/multihost.py",
        "1 if is_temporary(error) else 2",
        "2",
        _tests("ecdit_runs/test_outages", _BOTH),
        "an outage of one host ends the others with a code that does not restart",
    ),
    Mutant(
        "ecdit/checkpoints/resume.py",
        "        raise UnreadableError(text) from found",
        "        raise UnreadableError(text) from fault",
        _tests("ecdit_runs/test_outages", _BOTH),
    ),
    Mutant(
        "ecdit/checkpoints/save_barrier.py",
        "OUTAGE if error is not None and is_temporary(error) else",
        "OUTAGE if error is None else",
        _tests("ecdit_runs/test_outages", _BOTH),
    ),
    Mutant(
        _LOCK,
        "            raise kind(text) from found",
        "            raise kind(text) from problem",
        _tests("ecdit_runs/test_outages", _BOTH),
    ),
    Mutant(
        "ecdit/files.py",
        '    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")',
        '    scratch = path.with_name(f".{path.name}.tmp")',
        _tests("test_files", "test_two_writers_of_a_file_tear_nothing"),
    ),
    Mutant(
        "ecdit/files.py",
        "            sync(scratch)  # otherwise a power failure could leave an empty file under the new name\n",
        "",
        _tests("test_files", "test_contents_are_on_the_disk_before_the_name_and_the_name_before_it_returns"),
    ),
    Mutant(
        "ecdit/reporting/metrics_file.py",
        "    except ValueError:  # from JSON or UTF-8",
        "    except json.JSONDecodeError:",
        _tests("reporting/test_reporter", "test_garbled_and_doubled_lines_are_repaired_and_gaps_are_told"),
        "a garbled byte stops every restart",
    ),
    Mutant(
        _LOCK,
        "            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        _tests("ecdit_runs/test_lock", "test_a_second_trainer_is_refused_and_harms_nothing"),
        "two trainers mix their checkpoints",
    ),
    Mutant(
        _LOCK,
        "elif holder.token != self.own.token:",
        "elif not holder.token:",
        _tests("ecdit_runs/test_lock", "test_in_a_bucket_a_trainer_that_lost_its_lease_stops"),
        "a trainer that was cut off writes into another one's run",
    ),
    Mutant(
        _LOCK,
        "            if holder is None:  # another trainer may have held it and ended since",
        "            if holder is None and data is not None:",
        _tests("ecdit_runs/test_lock", "test_in_a_bucket_a_lease_that_is_gone_is_not_taken_back"),
        "two trainers whose leases followed each other mix their checkpoints",
    ),
    Mutant(
        _LOCK,
        "        if silent > LEASE_SECONDS - RENEW_SECONDS:",
        "        if silent < 0:",
        _tests(
            "ecdit_runs/test_lock",
            "test_in_a_bucket_nothing_may_be_written_before_a_lease_is_renewed_that_may_have_ended",
        ),
        "a trainer that was cut off writes into another one's run until it can read the bucket again",
    ),
    Mutant(
        _RUN,
        "evaluator.evaluate(sampling_params(state), step, self.lock.check_write)",
        "evaluator.evaluate(sampling_params(state), step, self.lock.check)",
        _tests("ecdit_runs/test_lock", _DRAWN_MEANWHILE),
    ),
    Mutant(
        _RUN,
        "images.write(sampling_params(state), step, self.lock.check_write)",
        "images.write(sampling_params(state), step, self.lock.check)",
        _tests("ecdit_runs/test_lock", _DRAWN_MEANWHILE),
        "a trainer that lost its lease while it drew replaces another one's images",
    ),
    Mutant(
        "ecdit/runs/sample_grids.py",
        "            permit()\n",
        "",
        _tests("ecdit_runs/test_sample_grids", "test_a_grid_is_not_written_without_permission"),
    ),
    Mutant(
        "ecdit/runs/evaluator.py",
        "            permit()\n",
        "",
        _tests("system/test_evaluation_in_training", "test_an_evaluation_is_not_written_without_permission"),
    ),
    Mutant(
        "ecdit/checkpoints/resume.py",
        "        permit()\n",
        "",
        _tests("checkpoints/test_resume", "test_a_damaged_checkpoint_stays_where_it_is_if_the_lease_was_lost"),
        "a trainer that lost its lease moves another one's checkpoint away",
    ),
    Mutant(
        "ecdit/runs/model_card.py",
        '    if experiment.autoencoder == "latents":  # the run has no autoencoder, which would make an image of them',
        "    if False:",
        _tests("ecdit_runs/test_diffusers_folder", "test_the_card_of_a_run_on_latents_alone_draws_latents"),
        "the script of an exported run that has latents alone fails",
    ),
    Mutant(
        _LOCK,
        'if hasattr(time, "CLOCK_BOOTTIME")',
        "if False",
        _tests("ecdit_runs/test_lock", "test_in_a_bucket_a_lease_ages_while_its_machine_is_suspended"),
        "a suspended machine that wakes up writes into the run of the trainer that took over",
    ),
    Mutant(
        _LOCK,
        "                self.generation, self.renewed = renewed, sent",
        "                self.generation, self.renewed = renewed, _clock()",
        _tests("ecdit_runs/test_lock", "test_in_a_bucket_a_renewal_counts_from_when_it_was_sent"),
    ),
    Mutant(
        "ecdit/checkpoints/async_save.py",
        "        if refused := anywhere(_problem(self.permit)):",
        "        if refused := None:",
        _tests("ecdit_runs/test_lock", "test_in_a_bucket_a_trainer_whose_lease_has_ended_writes_nothing"),
    ),
    Mutant(
        "ecdit/checkpoints/async_save.py",
        '{"post_finalization_callback": self.permit}',
        "{}",
        _tests(
            "ecdit_runs/test_lock",
            "test_in_a_bucket_a_save_is_not_committed_under_a_lease_that_has_ended_meanwhile",
        ),
    ),
    Mutant(
        "ecdit/storage.py",
        "                self.permit()\n",
        "",
        _tests("ecdit_runs/test_lock", "test_in_a_bucket_a_trainer_whose_lease_has_ended_writes_nothing"),
        "metrics of a trainer that was cut off replace those of another one",
    ),
    Mutant(
        "ecdit/storage.py",
        "    written = _key_value_store(path).write(path.name, data, if_equal=generation).result(seconds)",
        "    written = _key_value_store(path).write(path.name, data).result(seconds)",
        _tests("ecdit_runs/test_lock", "test_in_a_bucket_one_of_two_at_once_gets_the_lease"),
        "two trainers that start at once both get the lease",
    ),
    Mutant(
        _LOCK,
        "            if data is not None and not (holder and holder.has_ended()):",
        "            if data is not None and holder and not holder.has_ended():",
        _tests("ecdit_runs/test_lock", "test_in_a_bucket_a_garbled_lease_is_waited_for"),
    ),
    Mutant(
        _LOST,
        "    if saved == 0 and last <= 2 * save_every:",
        "    if saved == 0:",
        _tests("ecdit_runs/test_lost_checkpoints", "test_metrics_alone_show_that_there_was_a_checkpoint"),
        "a run whose checkpoints vanished starts over and loses its metrics",
    ),
    Mutant(
        _RUN,
        "            if place := set_metrics_aside(workdir):",
        "            if place := None:",
        _tests(
            "ecdit_runs/test_lost_checkpoints",
            "test_a_run_that_ended_before_its_first_save_begins_again_and_keeps_its_metrics_aside",
        ),
        "metrics are dropped without a word where no save was recorded",
    ),
    Mutant(
        "ecdit/reporting/metrics_file.py",
        'if re.fullmatch(r"[0-9]+\\.jsonl", path.name)',
        "if path.suffix",
        _tests("reporting/test_reporter", "test_a_resumed_run_keeps_the_parts_up_to_its_step"),
        "an object that somebody put beside the metrics stops every start",
    ),
    Mutant(
        "ecdit/runs/provenance.py",
        "    for name in COMPILERS:",
        "    for name in ():",
        _tests(
            "ecdit_runs/test_provenance",
            "test_the_version_of_a_backend_s_compiler_is_recorded_and_compared_if_it_is_installed",
        ),
        "hosts with different versions of libtpu train together",
    ),
    Mutant(
        "ecdit/reporting/writers.py",
        "                replace_text(id_file, secrets.token_hex(4))",
        "                id_file.write_text(secrets.token_hex(4))",
        _tests("reporting/test_writers", "test_the_id_of_a_run_of_wandb_is_whole_or_drawn_anew"),
    ),
    Mutant(
        _RUN,
        "                return INTERRUPTED if interrupted else PREEMPTED",
        "                return INTERRUPTED if stops.interrupted else PREEMPTED",
        _tests("ecdit_runs/test_hosts", "test_ctrl_c_to_one_of_two_processes_saves_the_same_step_on_both"),
        "a launcher restarts a part of the processes, which wait for the others",
    ),
    Mutant(
        _RUN,
        "        if not accepted.start_over:",
        "        if accepted.start_over:",
        _tests("ecdit_runs/test_lost_checkpoints", "test_the_same_command_refuses_and_changes_nothing"),
    ),
    Mutant(
        _COMPATIBLE,
        "    if saved.next_row != next_row:",
        "    if saved.next_row > next_row > saved.next_row:",
        _tests("ecdit_runs/test_provenance", "test_another_data_position_than_the_config_gives_is_refused"),
        "a run sees some of its data twice",
    ),
    Mutant(
        _COMPATIBLE,
        "    if other and not allow:",
        "    if other and allow:",
        _tests("ecdit_runs/test_provenance", "test_another_version_of_what_orders_the_data_is_refused_unless_accepted"),
    ),
    Mutant(
        _COMPATIBLE,
        "for key in differing if key in in_phases}",
        "for key in differing}",
        _tests("test_experiment_phases", "test_a_resume_with_another_value_is_told_the_phase_that_may_have_it"),
    ),
    Mutant(
        _COMPATIBLE,
        "    if saved.vocabulary != vocabulary:",
        "    if saved.vocabulary and not vocabulary:",
        _tests("ecdit_runs/test_provenance", "test_weights_of_another_vocabulary_are_refused"),
        "a run starts from weights for which every word is another one",
    ),
    Mutant(
        _RUN,
        "    if differences := host_differences(facts):",
        "    if (differences := host_differences(facts)) and not facts:",
        _tests(
            "ecdit_runs/test_hosts", "test_hosts_with_different_data_end_before_the_first_step_and_say_so[data-said0]"
        ),
        "hosts train on different data",
    ),
    Mutant(
        _RUN,
        " | host_facts(experiment.evaluation)",
        "",
        _tests(
            "ecdit_runs/test_hosts",
            "test_hosts_with_different_data_end_before_the_first_step_and_say_so[prompts-said1]",
        ),
        "a host without the file of prompts ends alone, and the others wait for it",
    ),
    Mutant(
        "ecdit/runs/sample_grids.py",
        "on_first(save)",
        "save()",
        _tests("ecdit_runs/test_sample_grids", "test_where_the_first_process_cannot_write_no_other_goes_on"),
        "a full disk ends the first process alone",
    ),
    Mutant(
        "ecdit/runs/evaluator.py",
        "on_first(write)",
        "write()",
        _tests("ecdit_runs/test_sample_grids", "test_where_the_first_process_cannot_write_no_other_goes_on"),
    ),
    Mutant(
        _LOOP,
        "            self.interrupted = self.signalled = True",
        "            self.interrupted = True",
        _tests("ecdit_runs/test_training_run", "test_ctrl_c_saves_the_running_step_and_the_same_command_goes_on"),
    ),
    Mutant(
        "ecdit/reporting/profiling.py",
        "            self.running = False\n            self.settle()\n",
        "            self.running = False\n",
        _tests("ecdit_runs/test_training_run", "test_a_trace_neither_begins_nor_ends_beside_a_running_save"),
        "the profiler crashes the process while a save runs",
    ),
    Mutant(
        "ecdit/checkpoints/restore.py",
        "    return ocp.checkpoint_managers.AnyPreservationPolicy([newest, milestones])",
        "    return milestones",
        _tests("ecdit_runs/test_training_run", "test_keep_every_leaves_those_of_every_so_many_steps_too"),
    ),
    Mutant(
        _LEDGER,
        "    before = [step for step in marks if step <= resumed]",
        "    before = list(marks)",
        _tests("ecdit_runs/test_goodput", "test_a_start_that_goes_on_from_before_an_earlier_one_loses_both"),
    ),
    Mutant(
        _LEDGER,
        "        self.record = Record(now - age, now, 0, {\"start\": age}, {})",
        "        self.record = Record(now, now, 0, {}, {})",
        _tests("ecdit_runs/test_goodput", "test_every_second_is_booked_by_another_clock"),
        "the imports of JAX are in no account",
    ),
    Mutant(
        _REPLAY,
        "    first, again = (device_sums(gradients(state, batch)) for _ in range(2))",
        "    first = again = device_sums(gradients(state, batch))",
        _tests("ecdit_runs/test_replay", "test_a_computation_that_went_wrong_once_names_step_and_device"),
    ),
    Mutant(
        _REPLAY,
        "            groups.setdefault(str(index), []).append(device)",
        "            groups.setdefault(str(device), []).append(device)",
        _tests("ecdit_runs/test_replay", "test_a_copy_of_a_parameter_that_has_changed_names_its_device"),
    ),
    Mutant(
        "ecdit/runs/host_times.py",
        "    return [time.whole - (time.step - shortest) for time in times]",
        "    return [time.whole for time in times]",
        _tests("ecdit_runs/test_host_times", "test_by_hand"),
    ),
    Mutant(
        _TOKENIZER,
        "    place, files = workdir / FOLDER, kept_files(workdir)",
        "    place, files = workdir / FOLDER, {}",
        _tests("ecdit_runs/test_kept_tokenizer", "test_prompts_are_encoded_as_in_training"),
        "another vocabulary in the data draws wrong images",
    ),
    Mutant(
        _TOKENIZER,
        "    if vocabulary is not None and hash_files(files) != vocabulary:",
        "    if vocabulary is None and hash_files(files) != vocabulary:",
        _tests("ecdit_runs/test_kept_tokenizer", "test_a_copy_that_was_changed_is_refused"),
        "a run encodes prompts by a tokenizer that it was not trained with",
    ),
    Mutant(
        _RUN,
        "            keep_tokenizer(tokenizer, workdir)",
        "            pass",
        _tests("ecdit_runs/test_kept_tokenizer", "test_training_keeps_its_tokenizer_and_a_start_over_moves_it_aside"),
    ),
    Mutant(
        "ecdit/runs/trained_run.py",
        "    if prepared.fingerprint != run.dataset:",
        "    if not prepared.fingerprint:",
        _tests("system/test_commands", "test_images_are_looked_up_in_the_data_of_the_training_alone"),
        "a run is measured on data that it was not trained on",
    ),
    Mutant(
        "ecdit/runs/exported.py",
        "if saved.get(name) != found]",
        "if name not in saved]",
        _tests("ecdit_runs/test_exported", "test_a_damaged_or_changed_folder_is_refused_by_name"),
        "a flipped bit in exported weights is not noticed",
    ),
    Mutant(
        _WEIGHTS,
        "            sync_tree(scratch)  # or a power failure could leave the folder's name with empty files\n",
        "",
        _tests("ecdit_runs/test_exported", "test_the_contents_are_on_the_disk_before_the_folder_has_its_name"),
    ),
    Mutant(
        _WEIGHTS,
        "        if shards[-1] and size + array.nbytes > shard_bytes:",
        "        if shards[-1] and size > shard_bytes:",
        _tests("ecdit_runs/test_exported", "test_shards_hold_what_fits_and_an_index_says_where"),
    ),
    Mutant(
        "ecdit/runs/inputs.py",
        "        not random or hosts == 1 or config.placeholder_ok,",
        "        not random or hosts >= 1 or config.placeholder_ok,",
        _tests("ecdit_runs/test_inputs", "test_random_numbers_on_several_hosts_are_refused_unless_that_is_meant"),
        "a pod trains for weeks on random numbers",
    ),
)  # fmt: skip
